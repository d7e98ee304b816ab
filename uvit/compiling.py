"""torch.compile for the blocks of a U-ViT, each kind of block once."""

from collections.abc import Iterable

import torch
from torch import nn

RECOMPILES = 64  # kinds of block x with and without gradients x batches and sizes of latents


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the blocks one by one. Blocks of one kind share a graph: a deep network compiles as fast as a flat one.

    The backward of one graph of the whole network would hand out its gradients when it is done, too late to send them
    meanwhile. Only `forward` is compiled: what gathers sharded parameters, around it, would break the graph.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
