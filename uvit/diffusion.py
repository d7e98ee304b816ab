"""The one definition of the diffusion process: schedule, noising, targets and losses.

Variance-preserving diffusion with 1000 steps (DDPM, Ho et al. 2020), x_n = a_n x_0 + s_n eps with a_n^2 + s_n^2 = 1.
Training, sampling, previews and conversion take their constants from here.

Shapes: latents, noise and predictions (B, C, H, W); timesteps (B,), n in 1..1000.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from uvit.conventions import PredictionType

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
CONTEXT_DROP_PROBABILITY = 0.1  # an empty caption replaces the caption, for guidance


# The schedule


@functools.cache
def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """abar_n for n = 0..1000, (1001,), float64: abar_0 = 1, abar_n = prod of the first n (1 - beta). DDPM eq. 4."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)]).to(device)


def log_snr(timesteps: Tensor) -> Tensor:
    """log(a_n^2 / s_n^2), (B,) float64, for timesteps in 1..1000; fractional ones are interpolated linearly."""
    abar = alphas_cumprod(timesteps.device)[1:]
    table = torch.log(abar) - torch.log1p(-abar)  # index n - 1
    position = (timesteps.double() - 1).clamp(0, NUM_TIMESTEPS - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=NUM_TIMESTEPS - 1)
    return torch.lerp(table[below], table[above], position - below)


def timestep_of_log_snr(value: Tensor) -> Tensor:
    """The timestep, a float in 1..1000, whose log-SNR is `value`: the inverse of `log_snr`."""
    table = log_snr(torch.arange(NUM_TIMESTEPS, 0, -1, device=value.device))  # rising
    above = torch.searchsorted(table, value.double().contiguous()).clamp(1, NUM_TIMESTEPS - 1)
    low, high = table[above - 1], table[above]
    return NUM_TIMESTEPS - (above - 1 + ((value - low) / (high - low)).clamp(0, 1))


def signal_and_noise(timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a_n, s_n), each (B, 1, 1, 1) in the dtype of `like`."""
    value = log_snr(timesteps.to(like.device)).view(-1, *[1] * (like.ndim - 1))
    return torch.sigmoid(value).sqrt().to(like.dtype), torch.sigmoid(-value).sqrt().to(like.dtype)


def add_noise(x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_n = a_n x_0 + s_n eps."""
    a, s = signal_and_noise(timesteps, x_0)
    return a * x_0 + s * noise


# What the network predicts


def target(x_0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: PredictionType) -> Tensor:
    """What a perfect network would predict. v = a_n eps - s_n x_0 (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    a, s = signal_and_noise(timesteps, x_0)
    return a * noise - s * x_0


def split_prediction(
    prediction: Tensor, x_n: Tensor, timesteps: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """(x_0, eps) that a prediction at x_n stands for."""
    a, s = signal_and_noise(timesteps, x_n)
    if prediction_type == "epsilon":
        return (x_n - s * prediction) / a, prediction
    if prediction_type == "sample":
        return prediction, (x_n - a * prediction) / s
    return a * x_n - s * prediction, s * x_n + a * prediction


def convert_prediction(
    prediction: Tensor, x_n: Tensor, timesteps: Tensor, from_type: PredictionType, to_type: PredictionType
) -> Tensor:
    """The same prediction in another parametrisation, so that any model samples with any scheduler."""
    if from_type == to_type:
        return prediction
    x_0, noise = split_prediction(prediction, x_n, timesteps, from_type)
    return target(x_0, noise, timesteps, to_type)


# The loss


def loss_weight(timesteps: Tensor, prediction_type: PredictionType, snr_gamma: float | None) -> Tensor:
    """Weight of each sample's loss, (B,) float32: 1, or min-SNR-gamma's (Hang et al. 2023) for that prediction."""
    if snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    snr = log_snr(timesteps).exp()
    clipped = snr.clamp(max=snr_gamma)
    weight = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction_type]
    return weight.float()


def loss(
    prediction: Tensor,
    x_0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prediction_type: PredictionType = "epsilon",
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean over C, H, W of (prediction - target)^2, weighted, then over the batch. A float32 scalar."""
    error = prediction.float() - target(x_0, noise, timesteps, prediction_type).float()
    return (error.square().mean(dim=(1, 2, 3)) * loss_weight(timesteps, prediction_type, snr_gamma)).mean()


# The VAE's posterior


def draw_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """A sample of the VAE's posterior, z: moments (B, 2 C, h, w), noise (B, C, h, w), float32."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise


# For diffusers schedulers


def scheduler_config(prediction_type: PredictionType = "epsilon") -> dict[str, Any]:
    """The schedule as settings of a diffusers scheduler."""
    return {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }


def from_scheduler_timestep(t: Tensor) -> Tensor:
    """The network's timestep, 1..1000, of a diffusers scheduler's timestep t in 0..999."""
    return t + 1
