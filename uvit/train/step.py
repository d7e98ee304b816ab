"""The training step: what happens between two values of the weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uvit.data.encoders import encode_tokens
from uvit.data.types import Batch
from uvit.diffusion import add_noise, draw_latents, loss
from uvit.train.optim import learning_rate_factor, set_learning_rate
from uvit.train.setup import Run


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    lr: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def batch_loss(run: Run, batch: Batch) -> Tensor:
    """Noise the latents, predict, compare: U-ViT's eq. 1 for epsilon. A float32 scalar."""
    precision = run.precision
    unet = precision.networks["unet"]
    x_0 = draw_latents(batch.moments.float(), batch.posterior_noise, run.latent_scale)
    x_n = add_noise(x_0, batch.noise, batch.timesteps)
    with precision.autocast():
        if batch.token_ids is None:
            assert batch.context is not None
            context = precision.cast(batch.context)
        else:
            context = encode_tokens(precision.networks["text_encoder"], batch.token_ids, run.pad_token_id)
        prediction = unet(precision.cast(x_n), batch.timesteps, context)
    return loss(prediction, x_0, batch.noise, batch.timesteps, run.config.prediction_type, run.config.snr_gamma)


def train_step(run: Run, batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over the next `gradient_accumulation_steps` batches; skipped if anything is not finite."""
    config, precision, optimizer = run.config, run.precision, run.optimizer
    lr = set_learning_rate(optimizer, learning_rate_factor(run.step, config, run.max_steps))

    total = torch.zeros((), device=run.device)
    for _ in range(config.gradient_accumulation_steps):
        share = batch_loss(run, next(batches)) / config.gradient_accumulation_steps
        precision.backward(share)
        total += share.detach()

    precision.collect_gradients(optimizer)
    parameters = list(run.networks.parameters())
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, grad_norm)

    result = StepResult(total.item(), grad_norm.item(), lr)
    precision.step(optimizer, result.finite)
    if run.ema and result.finite:
        run.ema.update(run.networks)
    run.step += 1
    return result
