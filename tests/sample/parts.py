"""A tiny real pipeline, and predictors that are known in closed form."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from uvit.conventions import DiffusionPath, PredictionType
from uvit.diffusion import convert_prediction, log_snr, signal_and_noise
from uvit.model import UViTT2IModel
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler
from uvit.weights.encoders import load_diffusers_vae, load_tokenizer, load_transformers_encoder

NAMES = ("dpmsolver++", "unipc", "euler", "heun", "ddim", "ddpm")
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def tiny_pipeline_folder(
    path: Path,
    prediction_type: PredictionType = "epsilon",
    latent_scale: float = 0.7,
    num_tokens: int = 16,
    diffusion_path: DiffusionPath = "vp",
    num_layers: int = 2,
) -> Path:
    """A U-ViT, a VAE and a text encoder of random weights: 32 pixels, latents (4, 8, 8), context (num_tokens, 32)."""
    text_folder = str(tiny_text_encoder_folder(path / "text", num_tokens))
    torch.manual_seed(0)
    unet = UViTT2IModel(
        sample_size=8,
        num_layers=num_layers,
        num_attention_heads=2,
        attention_head_dim=16,
        clip_dim=32,
        num_text_tokens=num_tokens,
    )
    with torch.no_grad():  # large enough weights that the prompt shows in the picture
        for parameter in unet.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    folder = path / "pipeline"
    vae = load_diffusers_vae(str(tiny_vae_folder(path / "vae")))
    encoder, tokenizer = load_transformers_encoder(text_folder), load_tokenizer(text_folder)
    scheduler = build_scheduler(path=diffusion_path)
    pipeline = UViTPipeline(
        vae, encoder, tokenizer, unet, scheduler, latent_scale, prediction_type, path=diffusion_path
    )
    pipeline.save_pretrained(folder)
    return folder


def gaussian_predictor(
    mean: Tensor, std: float, prediction_type: PredictionType, path: DiffusionPath = "vp"
) -> Callable[..., Tensor]:
    """What a perfect network predicts where x_0 is normal; mean (C, h, w); std 0 makes it one point."""

    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a, s = signal_and_noise(timesteps, x_n, path)
        x_0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x_n - a * mean)
        return convert_prediction(x_0, x_n, timesteps, "sample", prediction_type, path)

    return predict


def gaussian_flow(noise: Tensor, mean: Tensor, std: float, path: DiffusionPath = "vp") -> Tensor:
    """Where the probability flow takes x_1000 = `noise`, for that data, in closed form."""
    a, s = signal_and_noise(torch.tensor([1000]), noise, path)
    return mean + std * (noise - a * mean) / (a**2 * std**2 + s**2).sqrt()


# Data of which every value is drawn from a mixture of three normal distributions: shares, means, standard deviations.
MIXTURE = np.array([[0.3, 0.4, 0.3], [-1.0, 0.2, 1.1], [0.3, 0.5, 0.2]])


def mixture_x_0(x_n: np.ndarray, log_snrs: np.ndarray) -> np.ndarray:
    """The mean of x_0 given x_n, for that data, float64."""
    share, mean, std = MIXTURE
    a, s = (1 / np.sqrt(1 + np.exp(sign * log_snrs[..., None])) for sign in (-1, 1))
    variance = (a * std) ** 2 + s**2
    logits = np.log(share) - np.log(variance) / 2 - (x_n[..., None] - a * mean) ** 2 / (2 * variance)
    likely = np.exp(logits - logits.max(axis=-1, keepdims=True))
    x_0 = mean + a * std**2 / variance * (x_n[..., None] - a * mean)
    return (likely / likely.sum(axis=-1, keepdims=True) * x_0).sum(axis=-1)


def mixture_predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """The noise that a perfect network predicts for that data."""
    x_0 = mixture_x_0(x_n.double().numpy(), log_snr(timesteps).view(-1, 1, 1, 1).numpy())
    return convert_prediction(torch.from_numpy(x_0), x_n.double(), timesteps, "sample", "epsilon")


def linear_mixture_predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """The x_0 that a perfect network predicts for that data on a linear path."""
    t = (timesteps.double() / 1000).view(-1, 1, 1, 1)
    scale = torch.hypot(1 - t, t)  # the mean of x_0 given x_n is that of a vp path with the same SNR
    log_snrs = log_snr(timesteps, "linear").view(-1, 1, 1, 1).numpy()
    return torch.from_numpy(mixture_x_0((x_n.double() / scale).numpy(), log_snrs))


def linear_mixture_flow(x_1000: Tensor, timestep: float, num_steps: int = 200) -> Tensor:
    """Where a linear path's flow takes x_1000 at a timestep, for that data, float64: also by Runge-Kutta."""

    def slope(x: Tensor, t: float) -> Tensor:
        return (x - linear_mixture_predictor(x, torch.tensor([1000 * t]), x)) / t

    x = x_1000.double()
    for begin, end in itertools.pairwise(np.linspace(1, timestep / 1000, num_steps + 1).tolist()):
        h, middle = end - begin, (begin + end) / 2
        k1 = slope(x, begin)
        k2 = slope(x + h / 2 * k1, middle)
        k3 = slope(x + h / 2 * k2, middle)
        k4 = slope(x + h * k3, end)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def mixture_flow(x_1000: np.ndarray, num_steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Where the probability flow takes x_1000, for that data: (x_1, x_0 predicted there), float64.

    dy/d log(sigma) = y - x_0 with sigma = s / a and y = x / a (Karras et al. 2022); the classical Runge-Kutta method.
    """
    u = np.linspace(*(-log_snr(torch.tensor([1000, 1])) / 2).tolist(), num_steps + 1)

    def slope(y: np.ndarray, u: float) -> np.ndarray:
        return y - mixture_x_0(y / np.hypot(1, np.exp(u)), np.array(-2 * u))

    y = x_1000 * np.hypot(1, np.exp(u[0]))
    for begin, end in itertools.pairwise(u):
        h, middle = end - begin, (begin + end) / 2
        k1 = slope(y, begin)
        k2 = slope(y + h / 2 * k1, middle)
        k3 = slope(y + h / 2 * k2, middle)
        k4 = slope(y + h * k3, end)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    x_1 = y / np.hypot(1, np.exp(u[-1]))
    return x_1, mixture_x_0(x_1, np.array(-2 * u[-1]))
