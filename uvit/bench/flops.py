"""Floating-point work, counted without doing it."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uvit.model import UViTT2IModel


def count_flops(model_config: dict[str, Any], batch_size: int = 1) -> tuple[int, int]:
    """FLOPs of matrix products, convolutions and attention in (a forward pass, a forward and backward pass).

    A multiplication with its addition is 2. Runs on the meta device: no memory, no arithmetic.
    """
    with torch.device("meta"):
        model = UViTT2IModel(**model_config)
        latents, timesteps, context = random_inputs(model, batch_size)
    with FlopCounterMode(display=False) as forward:
        prediction = model(latents, timesteps, context)
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def random_inputs(model: UViTT2IModel, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (B, C, H, W), timesteps (B,) and context (B, T, D) of the model's sizes, on the default device."""
    rows, columns = model.grid
    size = (rows * model.patch_size, columns * model.patch_size)
    latents = torch.randn(batch_size, model.config["in_channels"], *size)
    timesteps = torch.randint(1, 1001, (batch_size,))
    context = torch.randn(batch_size, model.config["num_text_tokens"], model.config["clip_dim"])
    return latents, timesteps, context
