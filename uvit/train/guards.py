"""What keeps a run from being spoilt: which updates are left out, and which samples are passed over.

An update is left out (skipped) where the loss or the gradient is not finite, or the gradient is far larger than usual.
Samples on which that goes on and on are passed over: `rollback` goes back to the last checkpoint and jumps over them.
All of it is decided from numbers that a checkpoint keeps, so that a resumed run decides alike.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

NUM_NORMS = 100  # how many gradients say what is usual

SampleRange = tuple[int, int]  # of the sample counter: [first, end)


@dataclass
class Guards:
    """Changes from step to step, alike in all processes."""

    spike_factor: float  # times the median norm is too much; 0: nothing is
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_NORMS))  # the last finite ones
    skipped_in_a_row: int = 0
    skipped_from: int = 0  # the sample counter where these began
    passed_over: list[SampleRange] = field(default_factory=list)
    failed_at: int = 0  # the last step that a rollback undid
    num_rollbacks: int = 0  # since an update was made after that step
    good: str | None = None  # name of the last checkpoint that was not written amidst skipped updates

    def is_spike(self, norm: float) -> bool:
        if not self.spike_factor or len(self.norms) < NUM_NORMS:
            return False
        return 0 < self.spike_factor * statistics.median(self.norms) < norm

    def note(self, step: int, first_sample: int, norm: float | None, skipped: bool) -> None:
        """What became of optimizer step `step`, counted from 1; None: its norm was not finite."""
        if norm is not None:
            self.norms.append(norm)
        if skipped:
            if not self.skipped_in_a_row:
                self.skipped_from = first_sample
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        if step > self.failed_at:
            self.num_rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's record."""
        return {
            "norms": list(self.norms),
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_from": self.skipped_from,
            "passed_over": [list(stretch) for stretch in self.passed_over],
            "failed_at": self.failed_at,
            "num_rollbacks": self.num_rollbacks,
            "good": self.good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = deque(state["norms"], maxlen=NUM_NORMS)
        self.skipped_in_a_row, self.skipped_from = state["skipped_in_a_row"], state["skipped_from"]
        self.passed_over = [(first, end) for first, end in state["passed_over"]]
        self.failed_at, self.num_rollbacks, self.good = state["failed_at"], state["num_rollbacks"], state["good"]


def next_kept_sample(samples: int, samples_per_step: int, passed_over: Iterable[SampleRange]) -> int:
    """Where the next step begins: at `samples`, or behind the stretches that it would touch."""
    for first, end in sorted(passed_over):
        if first < samples + samples_per_step and samples < end:
            samples = end
    return samples


def step_ranges(
    samples: int, samples_per_step: int, num_steps: int, passed_over: list[SampleRange]
) -> Iterator[SampleRange]:
    """The next steps in parts with nothing to pass over within: (first sample, number of steps)."""
    while num_steps:
        start = next_kept_sample(samples, samples_per_step, passed_over)
        ahead = [(first - start) // samples_per_step for first, _ in passed_over if first >= start]
        count = min([num_steps, *ahead])
        yield start, count
        samples, num_steps = start + count * samples_per_step, num_steps - count
