import os
import platform
import subprocess
import sys

import pytest
import torch

from uvit.device import own_device, pick_device
from uvit.errors import UserError


def test_auto_and_names() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}"):
        pick_device(name)


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert own_device("auto") == (torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu"))
    assert own_device("cpu") == torch.device("cpu")


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
