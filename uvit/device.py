"""Which device to compute on, and how a process that computes on the CPU keeps its memory."""

import ctypes
import functools
import os
import platform
import time

import torch

from uvit.errors import UserError

SIDE, SECONDS = 512, 0.1  # of the matrix products that measure a CPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt


def pick_device(name: str) -> torch.device:
    """The device of this process, the same one for every command. `auto` is a GPU if there is one.

    A GPU has its index and becomes CUDA's current device. Unless `name` has an index, each process that torchrun or
    SLURM started on a machine has its own, as far as they suffice. Raises UserError if this machine does not have the
    device. For the CPU, this process keeps its freed memory from now on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise cannot_use(name, str(error)) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported; leave --device out, or pass --device cpu")
    if device.type == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = own_gpu(num_gpus) if device.index is None else device.index
    if num_gpus and index >= num_gpus:
        raise UserError(f"--device {name}: the last of this machine's {num_gpus} GPUs is cuda:{num_gpus - 1}")
    device = torch.device("cuda", index)
    try:
        torch.empty(0, device=device)  # raises where there is none
        torch.cuda.set_device(device)  # for what takes no device: CUDA's events, NCCL, new threads' pinned memory
    except (RuntimeError, AssertionError) as error:
        raise cannot_use(name, str(error)) from None
    use_tf32(True)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU with matrix products in bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some matrix products on this CPU. Takes a tenth of a second."""
    left, right = (torch.ones(SIDE, SIDE).to(dtype) for _ in range(2))
    product = left @ right
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        torch.mm(left, right, out=product)
        best = min(best, time.perf_counter() - before)
    return 2 * SIDE**3 / best


def slow_precision(flag: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A warning about a flag that has a CPU compute in 16 bits, if it has no instructions for that: products of
    matrices then take tens of times as long as in float32. No sentence otherwise."""
    if device.type != "cpu" or dtype == torch.float32:
        return []
    low, single = measured_peak(dtype), measured_peak(torch.float32)
    if low >= single / 2:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"{flag}: this CPU has no fast {name}: its matrix products were just measured to run at {low / 1e9:,.1f} "
        f"GFLOP/s, and at {single / 1e9:,.1f} in float32; leave {flag} out"
    ]


def use_tf32(enabled: bool) -> None:
    """Whether a GPU computes float32 matrix products and convolutions in TF32: with 10 bits of mantissa instead of 23,
    summed in float32, and several times as fast. A CPU always computes in float32.

    The environment variable NVIDIA_TF32_OVERRIDE=0, which NVIDIA's libraries read, turns it off in every command.
    """
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def own_gpu(num_gpus: int) -> int:
    """The index of this process's GPU: its rank on the machine, or 0 where it sees only one, as SLURM may arrange."""
    return int(os.environ.get("LOCAL_RANK", 0)) % max(1, num_gpus)


def cannot_use(name: str, reason: str) -> UserError:
    return UserError(f"--device {name}: cannot be used here ({reason.splitlines()[0]}); try --device auto")


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


def init_device(device: torch.device) -> torch.device:
    """Where new weights are initialised: on the CPU, so that all devices get the same ones; in a dry run nowhere."""
    return device if device.type == "meta" else torch.device("cpu")
