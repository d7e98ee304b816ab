"""Tensors between the layout in which processes use them and the layout that checkpoints keep.

In the checkpoint layout, a tensor has its published name, its global shape and its published order of rows. It is a
plain tensor, equal on all processes that hold it, or a DTensor of which each process holds one contiguous block (an
empty one if there are fewer rows than processes). So a checkpoint of one layout of processes can be read by any other,
a single process included.

Only one tensor differs while it is in use: under tensor parallelism, the rows of qkv are ordered by rank
(`parallelize.order_by_rank`). For qkv, `to_checkpoint_layout` makes a copy; it returns every other tensor as it is, in
the same memory.

- To save: write `to_checkpoint_layout(tensors, world)`.
- To load: fill `loaded = to_checkpoint_layout(tensors, world)` in place, then call
  `from_checkpoint_layout(tensors, loaded, world)`.

Both are collective: every process calls them with the same names in the same order.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from uvit.distributed.mesh import World
from uvit.distributed.ops import local_tensor


@torch.no_grad()
def to_checkpoint_layout(named_tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors in checkpoint layout. A name may have a prefix, as in `exp_avg/unet.mid_block.attn.qkv.weight`."""
    tensors = {}
    for name, tensor in named_tensors.items():
        if is_ordered_by_rank(name, tensor):
            rows = gather_rows(tensor, world).unflatten(1, (3, -1)).transpose(0, 1).flatten(0, 2)  # (3 D, columns)
            tensor = with_local(tensor, rows.chunk(world.degrees.tp)[world.tp_rank])
        tensors[name] = tensor
    return tensors


@torch.no_grad()
def from_checkpoint_layout(named_tensors: Mapping[str, Tensor], loaded: Mapping[str, Tensor], world: World) -> None:
    """Copy `loaded`, the filled result of `to_checkpoint_layout(named_tensors, world)`, to where it is used."""
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
    """Gather the rows of all tp ranks: (tp, rows, columns)."""
    mine = local_tensor(tensor).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world.degrees.tp)]
    dist.all_gather(parts, mine, group=world.group("tp"))
    return torch.stack(parts)


def with_local(tensor: Tensor, part: Tensor) -> DTensor:
    """A DTensor laid out like `tensor`, with `part` as the local tensor of this process."""
    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        part.clone(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
