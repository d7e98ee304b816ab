"""Applies parallelism to a U-ViT from outside: tensor parallel, activation checkpointing, compile, fully sharded.

Every process calls `parallelize` with the same weights, before the optimizer is made. Copies of the network (EMA
weights, float32 master weights) go through it too. All then have the same layout, and their updates are local. Plain
replication (`dp` alone) needs nothing here, only `ops.GradientAverage`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from uvit.compiling import compile_blocks
from uvit.distributed.mesh import World
from uvit.errors import UserError
from uvit.model import Block, UViTT2IModel, blocks_in_order


def parallelize(unet: UViTT2IModel, world: World, *, recompute: bool = False, compile: bool = False) -> None:
    """Works in place. Raises UserError if the degrees do not divide the sizes of the network."""
    blocks = blocks_in_order(unet)
    check_divisibility(blocks[0], world)
    if world.degrees.tp > 1:
        for block in blocks:
            split_block(block, world)
    if recompute:
        unet.enable_gradient_checkpointing()
    if compile:
        compile_blocks(blocks)
    shard(unet, world, blocks)


def check_divisibility(block: Block, world: World) -> None:
    tp, shard = world.degrees.tp, world.degrees.shard
    width, hidden = block.mlp.fc1.in_features, block.mlp.fc2.in_features
    num_heads = width // block.attn.head_dim
    if num_heads % tp or hidden % tp:
        raise UserError(
            f"--tensor_parallel_degree {tp}: does not divide the network's {num_heads} heads and its MLPs' width of "
            f"{hidden}; choose a degree that divides both"
        )
    if tp > 1 and block.attn.qkv.bias is not None:
        raise UserError(f"--tensor_parallel_degree {tp}: is not supported for networks with qkv_bias; use 1")
    if tp > 1 and (width % shard or hidden // tp % shard):
        raise UserError(
            f"--sharding_parallel_degree {shard}: does not divide the network's width {width} and its MLPs' width "
            f"{hidden} / {tp} (--tensor_parallel_degree); choose a degree that divides both"
        )


# Tensor parallel


def split_block(block: Block, world: World) -> None:
    """Give this process 1/tp of the heads and of the MLP's hidden units of a block. All else is replicated over tp.

    Inputs and outputs of attention and MLP are whole; activations between them are split.
    """
    assert world.mesh is not None
    mlp = block.mlp
    order_by_rank(block.attn.qkv.weight, 3, world.degrees.tp)
    order_by_rank(mlp.fc1.weight, mlp.fc1.out_features // mlp.fc2.in_features, world.degrees.tp)
    parallelize_module(
        block,
        world.mesh["tp"],
        {
            "attn.qkv": ColwiseParallel(),
            "attn.proj": RowwiseParallel(),
            "mlp.fc1": ColwiseParallel(),
            "mlp.fc2": RowwiseParallel(),
        },
        src_data_rank=None,  # all processes have the same weights, so each takes its part of its own
    )


@torch.no_grad()
def order_by_rank(weight: Tensor, num_parts: int, tp: int) -> None:
    """Reorder rows from parts to ranks x parts, in place: the parts are q, k and v, or the gates and values of SwiGLU.

    Split in the published order, the first rank would get queries only and the last rank values only.
    """
    weight.copy_(weight.unflatten(0, (num_parts, tp, -1)).transpose(0, 1).flatten(0, 2).clone())


# Fully sharded


def shard(module: nn.Module, world: World, blocks: Iterable[nn.Module] = ()) -> None:
    """Keep 1/shard of a network in each process. Each block is gathered when it runs; the rest is gathered together.

    Does nothing if the degree is 1. With replicas, gradients are averaged over both axes.
    """
    size = world.degrees.shard
    if size == 1:
        return
    assert world.mesh is not None
    mesh = world.mesh["dp", "shard"] if world.degrees.dp > 1 else world.mesh["shard"]

    def dim_to_shard(parameter: nn.Parameter) -> Shard:
        """The first dim that tensor parallelism left whole and that divides evenly, or else the first dim."""
        sharded = (
            {p.dim for p in parameter.placements if isinstance(p, Shard)} if isinstance(parameter, DTensor) else set()
        )
        even = [dim for dim, length in enumerate(parameter.shape) if dim not in sharded and length % size == 0]
        return Shard(even[0] if even else 0)

    # Gradients of a low-precision copy are added up, over microbatches and processes, in float32.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in [*blocks, module]:
        # After a forward without a backward (previews, validation) the root must not stay gathered: optimizer, EMA and
        # checkpoints need the shards.
        fully_shard(part, mesh=mesh, mp_policy=policy, shard_placement_fn=dim_to_shard, reshard_after_forward=True)
