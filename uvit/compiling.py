"""torch.compile for the blocks of a U-ViT, each kind of block once."""

import importlib
import shutil
from collections.abc import Iterable

import torch
from torch import nn

from uvit.errors import UserError

RECOMPILES = 64  # kinds of block x with and without gradients x batches and sizes of latents


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the blocks one by one. Blocks of one kind share a graph: a deep network compiles as fast as a flat one.

    The backward of one graph of the whole network would hand out its gradients when it is done, too late to send them
    meanwhile. Only `forward` is compiled: what gathers sharded parameters, around it, would break the graph.
    """
    blocks = list(blocks)
    if backend == "inductor" and next(blocks[0].parameters()).device.type == "cpu" and not torch.cuda.is_available():
        compiler = importlib.import_module("torch._inductor.config").cpp.cxx[1]  # g++, or what $CXX names
        if shutil.which(compiler) is None:
            raise UserError(f"--compile: needs the C++ compiler {compiler} on a CPU; install it, or leave the flag out")
    torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
