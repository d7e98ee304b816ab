"""Weights, averages and optimizer moments in the form that checkpoints keep, whatever the layout of the processes.

The canonical form of a tensor has its published name, global shape and order of rows. It is a plain tensor, alike in
all processes that hold it, or a DTensor of which each process holds one contiguous block (none of it, where there are
fewer rows than processes); its mesh has some of the axes (dp, shard, tp), and
`torch.distributed.tensor._utils.compute_local_shape_and_global_offset` tells where the block lies. So a checkpoint
written by one layout is read by any other, a world of one included, where all tensors are plain.

Only one tensor is laid out in another way while it is used: qkv's rows under tensor parallelism, which are ordered by
rank (see `parallelize.order_by_rank`). For those `canonical` makes copies; every other tensor is handed on as it is, in
the same memory. To save: write `canonical(...)`. To load: fill `target = canonical(...)` in place, then
`load_canonical(..., target)`. All three functions are collective: the same names in the same order in every process.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from uvit.checkpoint.saver import AllGather, single_process
from uvit.distributed.mesh import World
from uvit.distributed.ops import local_tensor


@torch.no_grad()
def to_checkpoint_layout(named_tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Names may have anything in front, such as `exp_avg/unet.mid_block.attn.qkv.weight`."""
    tensors = {}
    for name, tensor in named_tensors.items():
        if is_ordered_by_rank(name, tensor):
            rows = gather_rows(tensor, world).unflatten(1, (3, -1)).transpose(0, 1).flatten(0, 2)  # (3 D, columns)
            tensor = with_local(tensor, rows.chunk(world.degrees.tp)[world.tp_rank])
        tensors[name] = tensor
    return tensors


@torch.no_grad()
def from_checkpoint_layout(named_tensors: Mapping[str, Tensor], loaded: Mapping[str, Tensor], world: World) -> None:
    """Copy what `canonical(named_tensors, world)` returned, filled since then, back to where it is used."""
    for name, tensor in named_tensors.items():
        if is_ordered_by_rank(name, tensor):
            tp = world.degrees.tp
            rows = gather_rows(loaded[name], world).flatten(0, 1).unflatten(0, (3, tp, -1))  # (3, tp, D / tp, columns)
            local_tensor(tensor).copy_(rows[:, world.tp_rank].flatten(0, 1))
        elif loaded[name] is not tensor:
            local_tensor(tensor).copy_(local_tensor(loaded[name]))


def is_ordered_by_rank(name: str, tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor) or not name.endswith("attn.qkv.weight"):
        return False
    return "tp" in (tensor.device_mesh.mesh_dim_names or ())


def gather_rows(tensor: Tensor, world: World) -> Tensor:
    """The rows of all tp ranks: (tp, rows, columns)."""
    mine = local_tensor(tensor).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world.degrees.tp)]
    dist.all_gather(parts, mine, group=world.group("tp"))
    return torch.stack(parts)


def with_local(tensor: Tensor, part: Tensor) -> DTensor:
    """A DTensor laid out like `tensor` that holds `part`, which is shaped like its own, in this process."""
    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        part.clone(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


# How the processes of a run agree on a checkpoint in the background


def all_gather_channel(world: World) -> AllGather:
    """A channel of its own for a `Saver`, called by all processes alike; in a world of one nothing is opened.

    Its thread talks there while training's own collectives go on, so it must be another group, and on CPU.
    """
    if not world.parallel:
        return single_process
    group = dist.new_group(backend="gloo")

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * world.size
        dist.all_gather_object(values, value, group=group)
        return values

    return exchange
