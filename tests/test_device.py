"""The device of a process, its precision, and what it does with freed memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from uvit.device import measured_peak, own_gpu, pick_device, slow_precision, use_tf32
from uvit.errors import UserError


def test_auto_and_names() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}"):
        pick_device(name)


@pytest.mark.parametrize(
    ("rank", "num_gpus", "index"), [("0", 4, 0), ("3", 4, 3), ("3", 2, 1), ("5", 1, 0), ("1", 0, 0)]
)
def test_each_process_of_a_machine_has_its_own_gpu(
    rank: str, num_gpus: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as they suffice, and the only one where a scheduler shows it no other."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_gpu(num_gpus) == index
    monkeypatch.delenv("LOCAL_RANK")
    assert own_gpu(num_gpus) == 0


@pytest.mark.parametrize("name", ["mps", "xpu:0", "meta"])
def test_devices_that_are_not_supported_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: only cpu and cuda are supported"):
        pick_device(name)


def test_tf32_is_on_or_off() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for enabled in (True, False):
            use_tf32(enabled)
            assert (torch.get_float32_matmul_precision() != "highest") is torch.backends.cudnn.allow_tf32 is enabled
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_cpu_reaches_what_was_measured() -> None:
    assert 1e8 < measured_peak(torch.float32) < 1e14  # between a very old core and any server


@pytest.mark.parametrize(("low", "warned"), [(2e9, True), (90e9, False), (300e9, False)])
def test_a_cpu_without_instructions_for_16_bits_is_said(
    low: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks as they were measured on a CPU with AVX2 alone, and as others have them."""
    peaks = {torch.float32: 90e9, torch.bfloat16: low}
    monkeypatch.setattr("uvit.device.measured_peak", peaks.__getitem__)
    said = slow_precision("--bf16", torch.device("cpu"), torch.bfloat16)
    sentence = "matrix products were just measured to run at 2.0 GFLOP/s, and at 90.0 in float32; leave --bf16 out"
    assert [sentence in each for each in said] == [True] * warned
    assert slow_precision("--bf16", torch.device("cpu"), torch.float32) == []
    assert slow_precision("--bf16", torch.device("cuda"), torch.bfloat16) == []


def test_a_process_that_computes_on_the_cpu_keeps_its_freed_memory() -> None:
    """Blocks of 64 MiB that a thread fills and frees in turns: each time all pages are new, or the same ones."""
    code = """
import resource, sys, torch
from concurrent.futures import ThreadPoolExecutor
from uvit.device import keep_freed_memory, pick_device
pick_device("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pool = ThreadPoolExecutor(1)
pool.submit(faults).result()
print(pool.submit(faults).result(), keep_freed_memory(), sep=";")
"""

    def run(allocator: str) -> tuple[int, str]:
        environment = {**os.environ, "UVIT_ALLOCATOR": allocator}
        words = [sys.executable, "-c", code]
        result = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        faults, done = result.stdout.strip().split(";")
        return int(faults), done

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    faults, done = run("")
    assert faults < 100 and done == "glibc, freed memory is kept"
    faults, done = run("system")
    assert faults > 100 and done == "system"
