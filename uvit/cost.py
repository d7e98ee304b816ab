"""Work and memory of a U-ViT, counted without doing the work or taking the memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from uvit.model import UViTT2IModel


def hollow_unet(model_config: dict[str, Any], tp: int = 1) -> UViTT2IModel:
    """A U-ViT of shapes alone. `tp`: with the part of each block that one of so many tensor parallel processes has."""
    with torch.device("meta"):
        unet = UViTT2IModel(**model_config).train()
        for block in [*unet.in_blocks, unet.mid_block, *unet.out_blocks] if tp > 1 else []:
            attention, mlp = block.attn, block.mlp
            dim, hidden = mlp.fc1.in_features, mlp.fc1.out_features
            attention.qkv = nn.Linear(dim, 3 * dim // tp, bias=attention.qkv.bias is not None)
            attention.proj = nn.Linear(dim // tp, dim)
            mlp.fc1, mlp.fc2 = nn.Linear(dim, hidden // tp), nn.Linear(hidden // tp, dim)
    return unet


# Work


def count_flops(
    model_config: dict[str, Any], batch_size: int = 1, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """FLOPs of matrix products, convolutions and attention in (a forward pass, a forward and backward pass).

    A multiplication with its addition is 2. `size`: height and width of the latents, where not the model's own.
    """
    unet = hollow_unet(model_config)  # on the meta device attention is plain matrix products, which the counter knows
    with torch.device("meta"):
        inputs = _inputs(unet, batch_size, size)
    with FlopCounterMode(display=False) as forward:
        prediction = unet(*inputs)
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


# Memory


@dataclass(frozen=True)
class Trace:
    """Bytes alive after each operation of a forward and backward pass, besides the weights."""

    activations: list[int]  # what the backward needs, and what is in the making
    gradients: list[int]  # of weights, made so far
    kept: int  # by the forward for the backward

    def fullest(self, gradient_weight: float = 1.0) -> tuple[int, int]:
        """-> (activations, gradients) at the moment when most is alive, each byte of gradients counted so often."""
        moments = zip(self.activations, self.gradients, strict=True)
        return max(moments, key=lambda moment: moment[0] + gradient_weight * moment[1])


def trace_step(
    model_config: dict[str, Any],
    batch_size: int,
    size: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype = torch.float32,
    recompute: bool = False,
    tp: int = 1,
    encode: tuple[nn.Module, Callable[[Tensor], Tensor]] | None = None,
) -> Trace:
    """What a training step's forward and backward keep, in a CPU's kernels but for layer norms under autocast.

    A GPU's autocast computes those in float32, and keeps their inputs so; a CPU's leaves them in low precision.

    Args:
        size: height and width of the latents, where not the model's own.
        dtype, autocast: of the weights that compute, and of autocast (float32: none).
        encode: a text encoder that is trained as well, on the meta device, and what turns token ids into context
            with it. It is changed.
    """
    unet = hollow_unet(model_config, tp)
    if recompute:
        unet.enable_gradient_checkpointing()
    networks = nn.ModuleList([unet, encode[0]] if encode else [unet]).train()
    if autocast != torch.float32:
        norms_in_float32(networks)
    # All shape and no content, but on a CPU, whose attention kernel is fused; on the meta device it is not.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in networks.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))

        def compute() -> Tensor:
            latents, timesteps, context = _inputs(unet, batch_size, size)
            with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
                if encode:
                    context = encode[1](torch.zeros(context.shape[:2], dtype=torch.int64))
                return unet(latents.to(dtype), timesteps, context.to(dtype)).float().square().mean()

        return trace(networks, compute)


def norms_in_float32(networks: nn.Module) -> None:
    """As a GPU's autocast computes them."""
    for module in networks.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def trace(networks: nn.Module, compute: Callable[[], Tensor]) -> Trace:
    """Follow the memory of `compute() -> loss` and its backward."""
    gradients = 0

    def count(parameter: Tensor) -> None:
        nonlocal gradients
        assert parameter.grad is not None
        gradients += parameter.grad.nbytes

    handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in networks.parameters()]
    moments: list[tuple[int, int]] = []
    known = [*networks.parameters(), *networks.buffers()]
    with Alive(known, lambda num_bytes: moments.append((num_bytes, gradients))) as alive:
        loss = compute()
        kept = alive.bytes
        loss.backward()
        del loss
    moments.append((alive.bytes, gradients))
    for handle in handles:
        handle.remove()
    return Trace([num_bytes - grads for num_bytes, grads in moments], [grads for _, grads in moments], kept)


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live; calls `after` with that."""

    def __init__(self, known: list[Tensor], after: Callable[[int], None]):
        """known: not to count."""
        super().__init__()
        self.bytes = 0
        self.after = after
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        self.after(self.bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def _inputs(unet: UViTT2IModel, batch_size: int, size: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    sizes: Any = unet.config
    rows, columns = unet.grid
    height, width = size or (rows * unet.patch_size, columns * unet.patch_size)
    latents = torch.empty(batch_size, sizes.in_channels, height, width)
    context = torch.empty(batch_size, sizes.num_text_tokens, sizes.clip_dim)
    return latents, torch.ones(batch_size), context
