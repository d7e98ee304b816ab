"""How long each phase of a step takes, and how much memory the process has used."""

import contextlib
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator

import torch

PHASES = ("data", "forward", "backward", "optimizer", "save")


class Clock:
    """Seconds spent in each phase since the clock was last read.

    Work on a GPU is timed by CUDA events, without waiting for them. A phase that has not ended when the clock is read,
    usually the optimizer's, counts at the next reading.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_stopped = False
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.running: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def wait(self, phase: str) -> Iterator[None]:
        """Time a phase of this process."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    @contextlib.contextmanager
    def compute(self, phase: str) -> Iterator[None]:
        """Time a phase of the device."""
        if self.device.type != "cuda":
            with self.wait(phase):
                yield
            return
        if self.is_stopped:
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self.running.append((phase, begin, end))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time no phase of a GPU inside the context."""
        self.is_stopped = True
        try:
            yield
        finally:
            self.is_stopped = False

    def read(self) -> dict[str, float]:
        """{`forward_seconds`: ..., ...}"""
        while self.running and self.running[0][2].query():
            phase, begin, end = self.running.popleft()
            self.seconds[phase] += begin.elapsed_time(end) / 1000
        seconds, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return {f"{phase}_seconds": round(value, 6) for phase, value in seconds.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process so far: of its tensors on a GPU, otherwise its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
