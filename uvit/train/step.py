"""The training step: from the next batches to the next value of the weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from uvit.diffusion import add_noise, draw_latents, sample_losses
from uvit.distributed.ops import all_of, any_of, clip_gradients, grad_norm, mean_over_data
from uvit.images import to_unit
from uvit.train.alignment import alignment_targets, is_aligning, recorded_tokens
from uvit.train.guards import next_kept_sample
from uvit.train.loader import Batch
from uvit.train.optimizer import learning_rate_factor, set_learning_rate
from uvit.train.setup import Run
from uvit.weights.encoders import encode_tokens


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    lr: float
    skipped: bool  # if so, nothing was updated
    align_loss: float | None = None  # None: nothing is aligned

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value or 0) for value in (self.loss, self.grad_norm, self.align_loss))


def batch_losses(run: Run, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What training minimises: `batch_loss`, and the alignment loss if there is one. Float32 scalars."""
    if not is_aligning(run.config, run.step, run.max_steps):
        return batch_loss(run, batch), None
    model: Any = run.precision.compute_model
    with recorded_tokens(model["unet"], run.config.align_block) as tokens:
        loss = batch_loss(run, batch)
    targets = alignment_targets(run.config.align, model["unet"], clean_latents(run, batch), batch.teacher)
    with run.precision.autocast():
        return loss, model["projector"](tokens[0], targets)


def batch_loss(run: Run, batch: Batch) -> Tensor:
    """The loss of the U-ViT's predictions, weighted as in training. A float32 scalar."""
    return compute_losses(run, run.precision.compute_model, batch, run.config.loss_settings()).mean()


def compute_losses(
    run: Run, model: nn.Module, batch: Batch, weights: Mapping[str, Any] = MappingProxyType({})
) -> Tensor:
    """Add noise to the latents, predict, compare: U-ViT's eq. 1 for epsilon. (B,) float32.

    Args:
        model: one of the run's.
        weights: arguments of `loss_weight`. Without any, the loss is the squared error of what is predicted.
    """
    unet = model["unet"]  # type: ignore[index]
    dtype = next(unet.parameters()).dtype  # float32, or the low precision of a copy at O2
    x_0 = clean_latents(run, batch)
    path, prediction_type = run.conventions.path, run.conventions.prediction_type
    x_n = add_noise(x_0, batch.noise, batch.timesteps, path)
    with run.precision.autocast():
        context = batch_context(run, model, batch)
        prediction = unet(x_n.to(dtype), batch.timesteps, context.to(dtype))
    return sample_losses(prediction, x_0, batch.noise, batch.timesteps, prediction_type, path=path, **weights)


def clean_latents(run: Run, batch: Batch) -> Tensor:
    """x_0 (B, C, h, w), float32: a sample of the VAE's posterior, scaled; or the images in [-1, 1]."""
    if batch.images is not None:
        return to_unit(batch.images)
    assert batch.moments is not None
    assert batch.posterior_noise is not None
    return run.conventions.normalize(draw_latents(batch.moments.float(), batch.posterior_noise))


def batch_context(run: Run, model: nn.Module, batch: Batch) -> Tensor:
    """The text embeddings of a batch (B, T, D): stored ones, or its token ids encoded."""
    if batch.context is not None:
        return batch.context
    assert batch.token_ids is not None
    return encode_text(run, model, batch.token_ids)


def encode_text(run: Run, model: nn.Module, token_ids: Tensor) -> Tensor:
    """(B, T) -> (B, T, D): by the model's own text encoder, or else by the frozen one, in float32."""
    if run.frozen_text_encoder is None:
        return encode_tokens(model["text_encoder"], token_ids, run.pad_token_id)  # type: ignore[index]
    with torch.no_grad(), torch.autocast(run.device.type, enabled=False):  # as in an extraction
        return encode_tokens(run.frozen_text_encoder, token_ids, run.pad_token_id)


def train_step(run: Run, batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over the next `gradient_accumulation_steps` batches.

    All processes skip the step if, in one of them, the loss or the gradient is not finite or the gradient is a spike.
    """
    config, precision, optimizer, clock, guards = run.config, run.precision, run.optimizer, run.clock, run.guards
    lr = set_learning_rate(optimizer, learning_rate_factor(run.step, config, run.max_steps, run.schedule_steps))

    num_batches = config.gradient_accumulation_steps
    total_loss, total_align_loss = (torch.zeros((), device=run.device) for _ in range(2))
    for i in range(num_batches):
        run.gradients.microbatch(last=i == num_batches - 1)
        with clock.wait("data"):
            batch = next(batches)
        with clock.compute("forward"):
            loss, align_loss = batch_losses(run, batch)
            loss = loss / num_batches
            total_loss += loss.detach()
            if align_loss is not None:
                loss = loss + config.align_weight * align_loss / num_batches
                total_align_loss += align_loss.detach() / num_batches
        with clock.compute("backward"):
            precision.backward(loss)

    with clock.compute("backward"):
        run.gradients.finish()
        precision.collect_gradients()
        parameters = list(run.master_model.parameters())
        total_norm = grad_norm(parameters, run.world)
        if config.max_grad_norm > 0:
            clip_gradients(parameters, config.max_grad_norm, total_norm)

    mean_loss, norm = mean_over_data(total_loss, run.world).item(), total_norm.item()
    mean_align_loss = None if align_loss is None else mean_over_data(total_align_loss, run.world).item()
    finite = all(math.isfinite(value or 0) for value in (mean_loss, norm, mean_align_loss))
    skipped = any_of(not finite or guards.is_spike(norm), run.world)
    finite = all_of(finite, run.world) if skipped else True
    with clock.compute("optimizer"):
        run.before_update()
        precision.step(optimizer, update=not skipped, finite=finite)
        if run.ema:
            run.ema.update(run.master_model, run.step + 1, skipped)

    first_sample = next_kept_sample(run.samples, run.samples_per_step, guards.skipped_samples)
    run.step, run.samples = run.step + 1, first_sample + run.samples_per_step
    guards.record_step(run.step, first_sample, norm if finite else None, skipped)
    return StepResult(mean_loss, norm, lr, skipped, mean_align_loss)
