"""Where the time of a step goes, and how much memory it took."""

import contextlib
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator

import torch

PHASES = ("data", "forward", "backward", "optimizer", "save")


class Clock:
    """Seconds by part since the clock was last read.

    What a GPU computes is measured there, by events, and nothing waits for them: a part that has not ended when the
    clock is read, which is the optimizer's as a rule, is counted at the next reading.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.running: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def wait(self, part: str) -> Iterator[None]:
        """Time that this process spends."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    @contextlib.contextmanager
    def compute(self, part: str) -> Iterator[None]:
        """Time that the device spends."""
        if self.device.type != "cuda":
            with self.wait(part):
                yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self.running.append((part, begin, end))

    def read(self) -> dict[str, float]:
        """{`forward_seconds`: ..., ...}"""
        while self.running and self.running[0][2].query():
            part, begin, end = self.running.popleft()
            self.seconds[part] += begin.elapsed_time(end) / 1000
        seconds, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return {f"{part}_seconds": round(value, 6) for part, value in seconds.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has taken so far: on a GPU what its tensors have, elsewhere its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
