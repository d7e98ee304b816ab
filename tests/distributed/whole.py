"""Tensors of all processes put together, to compare them with those of one."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from uvit.checkpoint.layout import to_checkpoint_layout
from uvit.distributed.mesh import World


@torch.no_grad()
def full(named_tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """All tensors whole, on the CPU, in the main process; nothing in the others."""
    tensors = {}
    for name, tensor in to_checkpoint_layout(named_tensors, world).items():
        whole = join(tensor)
        if world.is_main:
            tensors[name] = whole.detach().to("cpu", copy=True)
    return tensors


def join(tensor: Tensor) -> Tensor:
    """A tensor's parts put together, in every process."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for i in range(len(placements)):  # one axis after another: at once, torch warns where two of them cut one dim
        placements[i] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
