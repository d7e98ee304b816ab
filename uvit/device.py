"""Which device to compute on, and how a process that computes on the CPU keeps its memory."""

import ctypes
import functools
import os
import platform

import torch

from uvit.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises UserError if this machine does not have the device.

    For the CPU, this process keeps its freed memory from now on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try --device auto"
        ) from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


@functools.cache
def keep_freed_memory() -> str:
    """Keep memory that is freed for the next allocation, and say what was done, for records.

    glibc returns large blocks to the kernel, and gets them back page by page, each zeroed: 50,000 page faults in a
    training step of batch 4, a twentieth of its time. Threads share one arena: in arenas of their own, glibc would map
    blocks above 64 MB anew each time. The environment variable UVIT_ALLOCATOR=system turns this off.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("UVIT_ALLOCATOR") == "system":
        return "system"
    libc = ctypes.CDLL(None)
    raised = libc.mallopt(M_MMAP_THRESHOLD, 2**30) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    raised = raised and libc.mallopt(M_ARENA_MAX, 1)
    return "glibc, freed memory is kept" if raised else "system"


def own_device(name: str) -> torch.device:
    """The same for processes that share work without talking to one another: with `auto`, each process that torchrun
    started on a machine has its own GPU.
    """
    if name == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return pick_device(f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}")
    return pick_device(name)
