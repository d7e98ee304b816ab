"""Work and memory of a U-ViT, counted without doing the work or taking the memory."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from uvit.model import UViTT2IModel


def count_flops(
    model_config: dict[str, Any], batch_size: int = 1, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """FLOPs of matrix products, convolutions and attention in (a forward pass, a forward and backward pass).

    A multiplication with its addition is 2. `size`: height and width of the latents, where not the model's own.
    """
    with torch.device("meta"):  # where attention is plain matrix products, which the counter knows
        unet = UViTT2IModel(**model_config)
        inputs = _inputs(unet, batch_size, size)
    with FlopCounterMode(display=False) as forward:
        prediction = unet(*inputs)
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def activation_bytes(
    model_config: dict[str, Any],
    batch_size: int,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> int:
    """Bytes that a forward pass keeps for its backward pass, in the kernels of a CPU; `dtype` is autocast's."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.device("meta"):
        unet = UViTT2IModel(**model_config).train()
    if recompute:
        unet.enable_gradient_checkpointing()
    # All shape and no content, but on a CPU, whose attention kernel is fused; on the meta device it is not.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
        parameters = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            unet(*_inputs(unet, batch_size, size))
    return sum(storage.nbytes() for storage in kept.values())


def _inputs(unet: UViTT2IModel, batch_size: int, size: tuple[int, int] | None) -> tuple[torch.Tensor, ...]:
    sizes: Any = unet.config
    rows, columns = unet.grid
    height, width = size or (rows * unet.patch_size, columns * unet.patch_size)
    latents = torch.empty(batch_size, sizes.in_channels, height, width)
    context = torch.empty(batch_size, sizes.num_text_tokens, sizes.clip_dim)
    return latents, torch.ones(batch_size), context
