"""The training step: from the next batches to the next value of the weights."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from uvit.diffusion import add_noise, draw_latents, sample_losses
from uvit.distributed.ops import clip_gradients, sum_over_all
from uvit.images import to_unit
from uvit.train.alignment import alignment_targets, is_aligning, recorded_tokens
from uvit.train.guards import next_kept_sample
from uvit.train.loader import Batch
from uvit.train.optimizer import learning_rate_factor, muon_rate, set_learning_rate
from uvit.train.setup import Run
from uvit.weights.encoders import encode_tokens


@dataclass(frozen=True)
class StepResult:
    """What a step measured. Its numbers are on the device: reading the first of them waits until the step is done."""

    step: int  # of the run, after it
    first_sample: int
    lr: float
    muon_lr: float | None  # None: Muon trains nothing
    aligned: bool
    numbers: Tensor  # (5,) float32: loss, alignment loss, gradient norm, and flags: finite, skipped

    def wait(self) -> None:
        """Wait until the step is done."""
        _ = self._read

    @functools.cached_property
    def _read(self) -> list[float]:
        return self.numbers.tolist()

    @property
    def loss(self) -> float:
        return self._read[0]

    @property
    def align_loss(self) -> float | None:
        """None: nothing is aligned."""
        return self._read[1] if self.aligned else None

    @property
    def grad_norm(self) -> float:
        return self._read[2]

    @property
    def finite(self) -> bool:
        """Of the loss and of the gradient, in all processes."""
        return bool(self._read[3])

    @property
    def skipped(self) -> bool:
        """If so, nothing was updated."""
        return bool(self._read[4])


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
    """(B, T) -> (B, T, D): by the model's own text encoder, or else by the frozen one in its dtype: float32, but
    bfloat16 on a GPU with --bf16.
    """
    if run.frozen_text_encoder is None:
        return encode_tokens(model["text_encoder"], token_ids, run.pad_token_id)  # type: ignore[index]
    with torch.no_grad(), torch.autocast(run.device.type, enabled=False):  # as in an extraction
        return encode_tokens(run.frozen_text_encoder, token_ids, run.pad_token_id)


def train_step(run: Run, batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over the next `gradient_accumulation_steps` batches. The host does not wait for the device.

    All processes skip the step if, in one of them, the loss or the gradient is not finite or the gradient is a spike.
    """
    config, precision, optimizer, clock = run.config, run.precision, run.optimizer, run.clock
    lr = set_learning_rate(optimizer, learning_rate_factor(run.step, config, run.max_steps, run.schedule_steps))

    losses = torch.zeros(2, device=run.device)
    for i in range(config.gradient_accumulation_steps):
        run.gradients.microbatch(last=i == config.gradient_accumulation_steps - 1)
        with clock.wait("data"):
            batch = next(batches)
        if run.replay:
            with clock.compute("backward"):
                losses += run.replay(batch)
        else:
            losses += forward_backward(run, batch)

    with clock.compute("backward"):
        run.gradients.finish()
        precision.collect_gradients()
        norm = run.grad_norm()
        if config.max_grad_norm > 0:
            clip_gradients(run.grad_norm.parameters, config.max_grad_norm, norm)

    numbers, finite, skipped = judge_step(run, losses, norm)
    with clock.compute("optimizer"):
        run.before_update()
        precision.step(optimizer, skipped, finite)
        if run.ema:
            run.ema.update(run.master_model, run.step + 1, skipped)

    aligned = is_aligning(config, run.step, run.max_steps)
    first_sample = next_kept_sample(run.samples, run.samples_per_step, run.guards.skipped_samples)
    run.step, run.samples = run.step + 1, first_sample + run.samples_per_step
    return StepResult(run.step, first_sample, lr, muon_rate(optimizer), aligned, numbers)


def forward_backward(run: Run, batch: Batch) -> Tensor:
    """Add what a batch says to the gradients. -> its parts of the step's loss and alignment loss, (2,)."""
    num_batches = run.config.gradient_accumulation_steps
    with run.clock.compute("forward"):
        loss, align_loss = batch_losses(run, batch)
        loss = loss / num_batches
        parts = [loss.detach(), torch.zeros_like(loss)]
        if align_loss is not None:
            loss = loss + run.config.align_weight * align_loss / num_batches
            parts[1] = align_loss.detach() / num_batches
    with run.clock.compute("backward"):
        run.precision.backward(loss)
    return torch.stack(parts)


@torch.no_grad()
def judge_step(run: Run, losses: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> (the numbers of a StepResult, whether all is finite, whether to skip the step), all on the device.

    They are the same in all processes, which exchange four numbers.
    """
    flags = [~norm.isfinite(), run.guards.is_spike(norm)]
    sums = sum_over_all(torch.cat([losses, torch.stack(flags).float()]), run.world)
    losses = sums[:2] / run.world.size
    finite = losses.isfinite().all() & (sums[2] == 0)
    skipped = ~finite | (sums[3] > 0)
    run.guards.add_norm(norm, finite)
    return torch.stack([*losses, norm, finite.float(), skipped.float()]), finite, skipped
