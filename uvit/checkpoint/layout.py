"""Tensors between the layout in which processes use them and the layout that checkpoints keep.

In the checkpoint layout, a tensor has its published name, its global shape and its published order of rows. It is a
plain tensor, equal on all processes that hold it, or a DTensor of which each process holds one contiguous block (an
empty one if there are fewer rows than processes). So a checkpoint of one layout of processes can be read by any other,
a single process included.

Few tensors differ while they are in use: under tensor parallelism, the rows of qkv, and those of fc1 where it holds
gates and values (SwiGLU), are ordered by rank (`parallelize.order_by_rank`). Of these, `to_checkpoint_layout` makes a
copy; it returns every other tensor as it is, in the same memory.

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
    """The tensors in checkpoint layout. A name may have a prefix, as in `exp_avg/unet.mid_block.attn.qkv.weight`.

    Where there is an fc1, its fc2 must be there too.
    """
    tensors = {}
    for name, tensor in named_tensors.items():
        if (parts := num_parts(name, named_tensors)) > 1:
            rows = gather_rows(tensor, world).unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)  # (3 D, columns)
            tensor = with_local(tensor, rows.chunk(world.degrees.tp)[world.tp_rank])
        tensors[name] = tensor
    return tensors


@torch.no_grad()
def from_checkpoint_layout(named_tensors: Mapping[str, Tensor], loaded: Mapping[str, Tensor], world: World) -> None:
    """Copy `loaded`, the filled result of `to_checkpoint_layout(named_tensors, world)`, to where it is used."""
    for name, tensor in named_tensors.items():
        if (parts := num_parts(name, named_tensors)) > 1:
            tp = world.degrees.tp
            rows = gather_rows(loaded[name], world).flatten(0, 1)  # (3 D, columns)
            rows = rows.unflatten(0, (parts, tp, -1))  # (3, tp, D / tp, columns)
            local_tensor(tensor).copy_(rows[:, world.tp_rank].flatten(0, 1))
        elif loaded[name] is not tensor:
            local_tensor(tensor).copy_(local_tensor(loaded[name]))


def num_parts(name: str, named_tensors: Mapping[str, Tensor]) -> int:
    """How many parts the rows have that are ordered by rank; 1: they are in the published order."""
    tensor = named_tensors[name]
    if not isinstance(tensor, DTensor) or "tp" not in (tensor.device_mesh.mesh_dim_names or ()):
        return 1
    if name.endswith("attn.qkv.weight"):
        return 3
    if name.endswith("mlp.fc1.weight"):
        return tensor.shape[0] // named_tensors[name.replace("mlp.fc1.weight", "mlp.fc2.weight")].shape[1]
    return 1


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
