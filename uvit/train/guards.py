"""Guard rails of a run: which steps are skipped, and which samples are skipped after a rollback.

A step is skipped, and nothing is updated, if the loss or the gradient is NaN or Inf, or the gradient norm is far larger
than usual. If too many steps in a row are skipped, `rollback.py` returns to the last good checkpoint, and the run skips
their samples from then on. All decisions follow from numbers that checkpoints store, so a resumed run decides alike.

Whether a step is skipped is decided on the device, and masks the update there. The host need not wait to know it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NUM_NORMS = 100  # gradient norms that the median is taken of

SampleRange = tuple[int, int]  # [first, end) of the sample counter


@dataclass
class Guards:
    """The state of the guards. It changes from step to step, and is the same in all processes."""

    spike_factor: float  # a gradient norm above this many times the median is a spike; 0: there are no spikes
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it is immutable
    norms: Tensor = field(init=False, compare=False)  # (NUM_NORMS,) float64: the last finite ones, before them NaN
    skipped_in_a_row: int = 0  # steps
    skipped_from: int = 0  # the sample counter at the first of these steps
    skipped_samples: list[SampleRange] = field(default_factory=list)
    failed_at: int = 0  # the last step that a rollback undid
    num_rollbacks: int = 0  # since the last update after that step
    last_good_checkpoint: str | None = None  # name of the last one saved when no step had just been skipped

    def __post_init__(self) -> None:
        self.set_norms([])

    def set_norms(self, norms: Iterable[float]) -> None:
        """Replace the last norms, oldest first."""
        known = list(norms)[-NUM_NORMS:]
        values = [math.nan] * (NUM_NORMS - len(known)) + known
        self.norms = torch.tensor(values, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def is_spike(self, norm: Tensor) -> Tensor:
        """Whether a gradient norm is far above the median: a flag, and a number, of 0 dimensions on the device."""
        ordered = self.norms.sort().values
        limit = self.spike_factor * (ordered[NUM_NORMS // 2 - 1] + ordered[NUM_NORMS // 2]) / 2
        return ~self.norms[0].isnan() & (limit > 0) & (norm > limit)

    @torch.no_grad()
    def add_norm(self, norm: Tensor, finite: Tensor) -> None:
        """Remember a norm, if it is finite."""
        self.norms = torch.where(finite, torch.cat([self.norms[1:], norm.double().view(1)]), self.norms)

    def record_step(self, step: int, first_sample: int, skipped: bool) -> None:
        """After optimizer step `step`, counted from 1, once the host knows whether it was skipped."""
        if skipped:
            if not self.skipped_in_a_row:
                self.skipped_from = first_sample
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        if step > self.failed_at:
            self.num_rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's uvit.json, with the keys that its format has."""
        return {
            "norms": [norm for norm in self.norms.tolist() if not math.isnan(norm)],
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_from": self.skipped_from,
            "passed_over": [list(sample_range) for sample_range in self.skipped_samples],
            "failed_at": self.failed_at,
            "num_rollbacks": self.num_rollbacks,
            "good": self.last_good_checkpoint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_norms(state["norms"])
        self.skipped_in_a_row, self.skipped_from = state["skipped_in_a_row"], state["skipped_from"]
        self.skipped_samples = [(first, end) for first, end in state["passed_over"]]
        self.failed_at, self.num_rollbacks = state["failed_at"], state["num_rollbacks"]
        self.last_good_checkpoint = state["good"]


def next_kept_sample(samples: int, samples_per_step: int, skipped_samples: Iterable[SampleRange]) -> int:
    """The first sample of the next step: `samples`, or the end of the skipped ranges that the step would touch."""
    for first, end in sorted(skipped_samples):
        if first < samples + samples_per_step and samples < end:
            samples = end
    return samples


def count_steps(samples: int, end: int, samples_per_step: int, skipped_samples: list[SampleRange]) -> int:
    """How many more steps there are until the sample counter has reached `end`."""
    num_steps = 0
    while (samples := next_kept_sample(samples, samples_per_step, skipped_samples)) < end:
        ahead = [(first - samples) // samples_per_step for first, _ in skipped_samples if first >= samples]
        count = min([-(-(end - samples) // samples_per_step), *ahead])
        samples, num_steps = samples + count * samples_per_step, num_steps + count
    return num_steps


def step_ranges(
    samples: int, samples_per_step: int, num_steps: int, skipped_samples: list[SampleRange]
) -> Iterator[tuple[int, int]]:
    """The next steps in groups without skipped samples between them: (first sample, number of steps)."""
    while num_steps:
        start = next_kept_sample(samples, samples_per_step, skipped_samples)
        ahead = [(first - start) // samples_per_step for first, _ in skipped_samples if first >= start]
        count = min([num_steps, *ahead])
        yield start, count
        samples, num_steps = start + count * samples_per_step, num_steps - count
