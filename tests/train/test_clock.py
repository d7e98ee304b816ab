"""What is measured is what took the time."""

import time

import pytest
import torch

from uvit.train.clock import PHASES, Clock, peak_memory_bytes


def test_parts_add_up_until_they_are_read() -> None:
    started = time.perf_counter()
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.wait("data"):
            time.sleep(0.02)
    with clock.compute("forward"):
        time.sleep(0.03)
    read = clock.read()
    assert set(read) == {f"{part}_seconds" for part in PHASES}
    assert read["data_seconds"] >= 0.04 and read["forward_seconds"] >= 0.03
    assert sum(read.values()) <= time.perf_counter() - started
    assert read["backward_seconds"] == 0
    assert set(clock.read().values()) == {0}


def test_memory_is_what_the_process_takes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before, dtype=torch.uint8)  # as much as ever, beside what is in use now
    assert peak_memory_bytes(torch.device("cpu")) > before + 2**26
    assert held.all()
    assert before > 2**26  # bytes, and not KiB: torch alone takes more


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_without_waiting_for_it() -> None:
    clock = Clock(torch.device("cuda"))
    left = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    with clock.compute("forward"):
        for _ in range(20):
            left @ left
    launched = time.perf_counter() - started
    early = clock.read()["forward_seconds"]
    torch.cuda.synchronize()
    assert early + clock.read()["forward_seconds"] > launched
