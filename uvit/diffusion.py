"""The one definition of the diffusion process: paths, noising, targets and losses.

A path is x_n = a_n x_0 + s_n eps, from x_0 to noise in 1000 steps:

- "vp": a_n^2 + s_n^2 = 1 (DDPM, Ho et al. 2020). At n = 1000 a little of x_0 is left, with an SNR of 0.0047.
- "vp_zero_snr": the same with its a_n shifted and scaled to end at zero SNR (Lin et al. 2023, algorithm 1).
- "linear": a_n = 1 - n / 1000 and s_n = n / 1000 (rectified flow, Liu et al. 2022).

Training, sampling, previews and conversion take their constants from here.

Shapes: latents, noise and predictions (B, C, H, W); timesteps (B,), n in 1..1000, or any n in (0, 1000] if linear.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from uvit.conventions import PREDICTION_TYPES, DiffusionPath, LossType, PredictionType

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
LEAST_ALPHA_CUMPROD = 2.0**-24  # that stands for zero SNR, as in diffusers, so that its logarithm is finite
CONTEXT_DROP_PROBABILITY = 0.1  # an empty caption replaces the caption, for guidance


# The paths


@functools.cache
def alphas_cumprod(device: torch.device | str = "cpu", path: DiffusionPath = "vp") -> Tensor:
    """abar_n for n = 0..1000 of a vp path, (1001,), float64: abar_0 = 1, abar_n = prod of the first n (1 - beta)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, dim=0)
    if path == "vp_zero_snr":
        a = abar.sqrt()
        abar = ((a - a[-1]) * a[0] / (a[0] - a[-1])).square().clamp(min=LEAST_ALPHA_CUMPROD)
    return torch.cat([torch.ones(1, dtype=torch.float64), abar]).to(device)


def log_snr(timesteps: Tensor, path: DiffusionPath = "vp") -> Tensor:
    """log(a_n^2 / s_n^2), (B,) float64. On vp paths, fractional timesteps are interpolated linearly."""
    if path == "linear":
        n = timesteps.double()
        return 2 * (torch.log(NUM_TIMESTEPS - n) - torch.log(n))
    abar = alphas_cumprod(timesteps.device, path)[1:]
    table = torch.log(abar) - torch.log1p(-abar)  # index n - 1
    position = (timesteps.double() - 1).clamp(0, NUM_TIMESTEPS - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=NUM_TIMESTEPS - 1)
    return torch.lerp(table[below], table[above], position - below)


def timestep_of_log_snr(value: Tensor, path: DiffusionPath = "vp") -> Tensor:
    """The timestep, a float, whose log-SNR is `value`: the inverse of `log_snr`."""
    if path == "linear":
        return NUM_TIMESTEPS * torch.sigmoid(-value.double() / 2)
    table = log_snr(torch.arange(NUM_TIMESTEPS, 0, -1, device=value.device), path)  # rising
    above = torch.searchsorted(table, value.double().contiguous()).clamp(1, NUM_TIMESTEPS - 1)
    low, high = table[above - 1], table[above]
    return NUM_TIMESTEPS - (above - 1 + ((value - low) / (high - low)).clamp(0, 1))


def split_log_snr(value: Tensor, path: DiffusionPath = "vp") -> tuple[Tensor, Tensor]:
    """(a, s) where the log-SNR is `value`."""
    if path == "linear":
        return torch.sigmoid(value / 2), torch.sigmoid(-value / 2)
    return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()


def signal_and_noise(timesteps: Tensor, like: Tensor, path: DiffusionPath = "vp") -> tuple[Tensor, Tensor]:
    """(a_n, s_n), each (B, 1, 1, 1) in the dtype of `like`."""
    a, s = split_log_snr(log_snr(timesteps.to(like.device), path).view(-1, *[1] * (like.ndim - 1)), path)
    return a.to(like.dtype), s.to(like.dtype)


def add_noise(x_0: Tensor, noise: Tensor, timesteps: Tensor, path: DiffusionPath = "vp") -> Tensor:
    """x_n = a_n x_0 + s_n eps."""
    a, s = signal_and_noise(timesteps, x_0, path)
    return a * x_0 + s * noise


# What the network predicts


def target(
    x_0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: PredictionType, path: DiffusionPath = "vp"
) -> Tensor:
    """What a perfect network would predict. v = a_n eps - s_n x_0 (Salimans & Ho 2022); flow = eps - x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    if prediction_type == "flow_prediction":
        return noise - x_0
    a, s = signal_and_noise(timesteps, x_0, path)
    return a * noise - s * x_0


def split_prediction(
    prediction: Tensor, x_n: Tensor, timesteps: Tensor, prediction_type: PredictionType, path: DiffusionPath = "vp"
) -> tuple[Tensor, Tensor]:
    """(x_0, eps) that a prediction at x_n stands for."""
    a, s = signal_and_noise(timesteps, x_n, path)
    if prediction_type == "epsilon":
        return (x_n - s * prediction) / a, prediction
    if prediction_type == "sample":
        return prediction, (x_n - a * prediction) / s
    if prediction_type == "flow_prediction":  # a + s = 1
        return x_n - s * prediction, x_n + a * prediction
    return a * x_n - s * prediction, s * x_n + a * prediction


def convert_prediction(
    prediction: Tensor,
    x_n: Tensor,
    timesteps: Tensor,
    from_type: PredictionType,
    to_type: PredictionType,
    path: DiffusionPath = "vp",
) -> Tensor:
    """The same prediction in another parametrisation, so that any model samples with any scheduler of its path."""
    if from_type == to_type:
        return prediction
    x_0, noise = split_prediction(prediction, x_n, timesteps, from_type, path)
    return target(x_0, noise, timesteps, to_type, path)


# The loss

_SPACES = {"sample": "x", "epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "v"}


def error_weight(timesteps: Tensor, space: str, path: DiffusionPath = "vp") -> Tensor:
    """The square of an error in a space (epsilon, x or v) by that of the same error in x_0: (B,) float64."""
    snr = log_snr(timesteps, path).exp()
    if space == "v":  # 1 / s^2, of v and of the flow alike
        return (1 + snr.sqrt()).square() if path == "linear" else snr + 1
    return snr if space == "epsilon" else torch.ones_like(snr)


def loss_weight(
    timesteps: Tensor,
    prediction_type: PredictionType,
    snr_gamma: float | None = None,
    loss_type: LossType = "prediction",
    loss_weight_max: float | None = None,
    path: DiffusionPath = "vp",
) -> Tensor:
    """Weight of each sample's loss, (B,) float32, by the squared error of what is predicted.

    Args:
        snr_gamma: min-SNR-gamma (Hang et al. 2023): the error of x_0, weighted by SNR, but at most this.
        loss_type: the space in which the error is measured instead; `prediction` is what is predicted.
        loss_weight_max: the most that the error of x_0 is weighted by.
    """
    own = _SPACES[prediction_type]
    if snr_gamma is None and loss_type in ("prediction", own) and loss_weight_max is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    if snr_gamma is not None:
        wanted = log_snr(timesteps, path).exp().clamp(max=snr_gamma)
    else:
        wanted = error_weight(timesteps, own if loss_type == "prediction" else loss_type, path)
        if loss_weight_max is not None:
            wanted = wanted.clamp(max=loss_weight_max)
    return (wanted / error_weight(timesteps, own, path)).float()


def sample_losses(
    prediction: Tensor,
    x_0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prediction_type: PredictionType = "epsilon",
    snr_gamma: float | None = None,
    loss_type: LossType = "prediction",
    loss_weight_max: float | None = None,
    path: DiffusionPath = "vp",
) -> Tensor:
    """The mean over C, H, W of (prediction - target)^2, weighted: (B,) float32. Training minimises their mean."""
    error = prediction.float() - target(x_0, noise, timesteps, prediction_type, path).float()
    weight = loss_weight(timesteps, prediction_type, snr_gamma, loss_type, loss_weight_max, path)
    return error.square().mean(dim=(1, 2, 3)) * weight


# The VAE's posterior


def draw_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """A sample of the VAE's posterior, z: moments (B, 2 C, h, w), noise (B, C, h, w), float32."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise


# For diffusers schedulers


def scheduler_config(prediction_type: PredictionType | None = None, path: DiffusionPath = "vp") -> dict[str, Any]:
    """The path as settings of a diffusers scheduler."""
    special = {"linear": {"use_flow_sigmas": True}, "vp_zero_snr": {"rescale_betas_zero_snr": True}, "vp": {}}
    return {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type or PREDICTION_TYPES[path][0],
        **special[path],
    }


def from_scheduler_timestep(t: Tensor, path: DiffusionPath = "vp") -> Tensor:
    """The network's timestep, 1..1000, of a diffusers scheduler's timestep t: in 0..999, or the same if linear."""
    return t if path == "linear" else t + 1
