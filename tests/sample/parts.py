"""A tiny real pipeline, and predictors that are known in closed form."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from uvit.data.encoders import load_text_encoder, load_tokenizer, load_vae
from uvit.diffusion import PredictionType, convert_prediction, signal_and_noise
from uvit.model import UViTT2IModel
from uvit.sample.export import save_pipeline

NAMES = ("dpmsolver++", "unipc", "euler", "heun", "ddim", "ddpm")
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def tiny_pipeline_folder(
    path: Path, prediction_type: PredictionType = "epsilon", latent_scale: float = 0.7, num_tokens: int = 16
) -> Path:
    """A U-ViT, a VAE and a text encoder of random weights: 32 pixels, latents (4, 8, 8), context (num_tokens, 32)."""
    text_folder = str(tiny_text_encoder_folder(path / "text", num_tokens))
    torch.manual_seed(0)
    unet = UViTT2IModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        clip_dim=32,
        num_text_tokens=num_tokens,
    )
    with torch.no_grad():  # large enough weights that the prompt shows in the picture
        for parameter in unet.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    folder = path / "pipeline"
    vae = load_vae(str(tiny_vae_folder(path / "vae")))
    encoder, tokenizer = load_text_encoder(text_folder), load_tokenizer(text_folder)
    save_pipeline(folder, unet, vae, encoder, tokenizer, latent_scale, prediction_type)
    return folder


def gaussian_predictor(mean: Tensor, std: float, prediction_type: PredictionType) -> Callable[..., Tensor]:
    """What a perfect network predicts where x_0 is normal; mean (C, h, w); std 0 makes it one point."""

    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a, s = signal_and_noise(timesteps, x_n)
        x_0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x_n - a * mean)
        return convert_prediction(x_0, x_n, timesteps, "sample", prediction_type)

    return predict


def gaussian_flow(noise: Tensor, mean: Tensor, std: float) -> Tensor:
    """Where the probability flow takes x_1000 = `noise`, for that data, in closed form."""
    a, s = signal_and_noise(torch.tensor([1000]), noise)
    return mean + std * (noise - a * mean) / (a**2 * std**2 + s**2).sqrt()
