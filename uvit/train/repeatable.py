"""`--deterministic`: the same command computes the same bits on a GPU too."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Only deterministic kernels meanwhile; an operation that has none is an error. Enter it before CUDA starts."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    choose(True, True, False, False)  # attention is left to kernels that heed the first of these
    try:
        yield
    finally:
        choose(*before)


def choose(algorithms: bool, cudnn: bool, benchmark: bool, cudnn_attention: bool) -> None:
    torch.use_deterministic_algorithms(algorithms)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn, benchmark
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
