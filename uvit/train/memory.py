"""How much memory a training step takes, traced from shapes alone: no numbers are computed, and no memory is taken.

A forward and a backward pass run on tensors that have a shape and no content. After each operation, the bytes of all
tensors that are still alive are recorded.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uvit.model import Attention
from uvit.modern_model import ModernAttention
from uvit.train.adamw import FusedAdamW
from uvit.train.alignment import Projector, empty_targets, recorded_tokens
from uvit.train.muon import Muon, block_matrices, orthogonalize, shape_batches
from uvit.train.profiling import meta_inputs, meta_unet
from uvit.weights.encoders import encode_tokens


@dataclass(frozen=True)
class MemoryTrace:
    """Bytes alive after each operation of a forward and backward pass, without the weights."""

    activations: list[int]  # saved for the backward pass, and temporary tensors
    gradients: list[int]  # of the weights
    saved: int  # by the forward pass for the backward pass

    def peak(self, gradient_weight: float = 1.0) -> tuple[int, int]:
        """-> (activations, gradients) when their sum is largest; gradients count `gradient_weight` times."""
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
    text_encoder: nn.Module | None = None,
    pad_token_id: int = 0,
    projector: Projector | None = None,
    align_block: int = 1,
    fused_attention: bool | None = True,
) -> MemoryTrace:
    """The memory of a forward and backward pass of the U-ViT.

    The kernels are those of a CPU, except for layer norms under autocast. A GPU's autocast computes them in float32 and
    saves their inputs in float32; a CPU's keeps the low precision.

    Args:
        size: height and width of the latents. Default: those of the model.
        dtype, autocast: of the weights that compute, and of autocast (float32: no autocast).
        tp: trace one of so many tensor parallel processes.
        text_encoder: a text encoder on the meta device that is trained along with the U-ViT.
        projector: on the meta device, to be aligned with the tokens of block `align_block`.
        fused_attention: as on a GPU. None: as on a CPU, which keeps the weights of attention in half precision.
    """
    unet = meta_unet(model_config, tp)
    if recompute:
        unet.enable_gradient_checkpointing()
    for module in unet.modules():
        if isinstance(module, Attention | ModernAttention):
            module.fused = fused_attention
    encoder, projector = copy.deepcopy((text_encoder, projector))
    networks = nn.ModuleList(network for network in (unet, encoder, projector) if network).train()
    if autocast != torch.float32:
        layer_norms_in_float32(networks)
    # Fake tensors of a CPU, and not the meta device: attention has a fused kernel on the former only.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in networks.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))

        def compute_loss() -> Tensor:
            latents, timesteps, context = meta_inputs(unet, batch_size, size)
            with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
                if encoder:
                    context = encode_tokens(encoder, torch.zeros(context.shape[:2], dtype=torch.int64), pad_token_id)
                if projector is None:
                    return unet(latents.to(dtype), timesteps, context.to(dtype)).float().square().mean()
                with recorded_tokens(unet, align_block) as tokens:
                    loss = unet(latents.to(dtype), timesteps, context.to(dtype)).float().square().mean()
                return loss + projector(tokens[0], empty_targets(unet, projector, latents))

        return trace_memory(networks, compute_loss)


def trace_muon(networks: Iterable[nn.Module], dtype: torch.dtype, num_processes: int = 1) -> tuple[int, int]:
    """-> (bytes that Muon's step takes at its peak, without weights, gradients and momentum; bytes of orthogonal
    matrices that each of `num_processes` sends).

    The first are those of replicas. Sharded and tensor parallel processes take at most as many. `dtype`: of the
    iterations.
    """
    peak, sent = 0, 0

    class FirstOfMany(Muon):
        def orthogonalize(self, matrices: Tensor) -> Tensor:
            nonlocal sent
            if num_processes == 1:
                return super().orthogonalize(matrices)
            own = matrices[: -(-len(matrices) // num_processes)]
            part = torch.cat([orthogonalize(own), own[:0]])  # as in map_in_parts
            sent += (num_processes - 1) * part.nbytes
            return part.new_empty(num_processes * len(part), *part.shape[1:])[: len(matrices)]

    def after_operation(num_bytes: int) -> None:
        nonlocal peak
        peak = max(peak, num_bytes)

    with FakeTensorMode(allow_non_fake_inputs=True):
        groups: dict[int, list[Tensor]] = {}
        for network in networks:
            for weight, num_matrices in block_matrices(network).items():
                groups.setdefault(num_matrices, []).append(torch.zeros(weight.shape))
        parameters = [parameter for group in groups.values() for parameter in group]
        for parameter in parameters:
            parameter.grad = torch.zeros(parameter.shape)
        others = FusedAdamW([{"params": [torch.zeros(1)]}])
        optimizer = FirstOfMany(
            [{"params": group, "num_matrices": count} for count, group in groups.items()], others, 0, dtype
        )
        kept = [optimizer.momentum(parameter) for parameter in parameters]
        kept += [tensor for parameter in parameters for tensor in (parameter, parameter.grad) if tensor is not None]
        with MemoryTracker(kept, after_operation):
            for count, group in groups.items():
                for batch in shape_batches(group, count):
                    optimizer.update(batch, count, 0.0, 0.0)
    return peak, sent


def layer_norms_in_float32(networks: nn.Module) -> None:
    """Compute them as a GPU's autocast does."""
    for module in networks.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def trace_memory(networks: nn.Module, compute_loss: Callable[[], Tensor]) -> MemoryTrace:
    """Run a forward and a backward pass and record their memory."""
    gradients = 0

    def count(parameter: Tensor) -> None:
        nonlocal gradients
        assert parameter.grad is not None
        gradients += parameter.grad.nbytes

    handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in networks.parameters()]
    moments: list[tuple[int, int]] = []
    weights = [*networks.parameters(), *networks.buffers()]
    with MemoryTracker(weights, lambda num_bytes: moments.append((num_bytes, gradients))) as tracker:
        loss = compute_loss()
        saved = tracker.bytes
        loss.backward()
        del loss
    moments.append((tracker.bytes, gradients))
    for handle in handles:
        handle.remove()
    return MemoryTrace([num_bytes - grads for num_bytes, grads in moments], [grads for _, grads in moments], saved)


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and calls `after_operation(bytes)` after each operation."""

    def __init__(self, ignored: list[Tensor], after_operation: Callable[[int], None]):
        """`ignored`: tensors that are not counted."""
        super().__init__()
        self.bytes = 0
        self.after_operation = after_operation
        self.known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.after_operation(self.bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size
