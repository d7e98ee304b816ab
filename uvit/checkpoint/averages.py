"""Averages of a run's weights whose length is chosen after training (post-hoc EMA, Karras et al. 2024, EDM2).

During training, averages of a few lengths are kept, and snapshots of them written. Where an EMA with a constant decay
weighs the last steps alike whatever the run's length, these weigh step t of T steps by (t / T)^gamma. The length of
such an average is the standard deviation of its weights over time, as a fraction of T. A weighted sum of the snapshots
comes near to the average of any length, by least squares.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.errors import UserError
from uvit.io import write_atomically

SNAPSHOTS = "ema"  # the folder in a run's
_NAME = re.compile(r"step-(\d+)-([\d.e-]+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The average of some length after some steps."""

    step: int
    length: float

    @property
    def gamma(self) -> float:
        return gamma_of(self.length)

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}-{self.length:g}.safetensors"


@functools.cache
def gamma_of(length: float) -> float:
    """The exponent of the average of a length: length = sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2).

    Length falls as gamma rises from 0, so gamma is found by halving an interval.
    """
    low, high = 0.0, 2.0 / length  # at `high` the length is too small
    for _ in range(100):
        gamma = (low + high) / 2
        if ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2) > length:
            low = gamma
        else:
            high = gamma
    return (low + high) / 2


def decay_of(length: float, step: int, num_steps: int = 1) -> float:
    """The decay of an update after `step` steps that stands for the last `num_steps` of them. The first one is 0."""
    return (1 - num_steps / step) ** (gamma_of(length) + 1)


def inner_product(a: Snapshot, b: Snapshot) -> float:
    """Of the weights of two averages over time, each of which sums to 1."""
    first = min(a.step, b.step)
    ratio = (first / a.step) ** a.gamma * (first / b.step) ** b.gamma * first / (a.step * b.step)
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * ratio


def solve_weights(snapshots: Sequence[Snapshot], wanted: Snapshot) -> np.ndarray:
    """The factors of the sum of snapshots that comes nearest to an average: (number of snapshots,), float64.

    Their sum is 1, by a Lagrange multiplier: weights that have stopped changing are found again whatever the length.
    """
    products = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    right = np.array([inner_product(a, wanted) for a in snapshots])
    unit = wanted.step  # products are of the order of 1 / steps, the sum of the factors of 1
    ones = np.ones((len(snapshots), 1))
    system = np.block([[products * unit, ones], [ones.T, np.zeros((1, 1))]])
    return np.linalg.lstsq(system, np.append(right * unit, 1.0), rcond=1e-13)[0][:-1]


# On disk


def write_snapshot(run: Path, snapshot: Snapshot, tensors: dict[str, Tensor]) -> None:
    """Write one file in the run's folder, whole or not at all. Raises UserError if it cannot be written."""
    path = run / SNAPSHOTS / snapshot.name
    facts = {"step": snapshot.step, "length": snapshot.length}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            save_file(tensors, temporary, metadata={"uvit_ema": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); fix this and run the same command again") from None


def delete_snapshots_after(run: Path, step: int) -> None:
    """Those of later steps, which a resume or a rollback does once more, and perhaps otherwise."""
    for path in (run / SNAPSHOTS).glob("*.safetensors"):
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) > step:
            path.unlink()


def list_snapshots(run: Path) -> dict[Snapshot, Path]:
    """Those of a run up to its last checkpoint, in order. What came later, the run does once more when it resumes."""
    checkpoints = checkpoint_folders(run)
    last = read_checkpoint(checkpoints[-1]).step if checkpoints else 0
    found = {}
    for path in sorted((run / SNAPSHOTS).glob("*.safetensors")):
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) <= last:
            found[Snapshot(int(match[1]), float(match[2]))] = path
    return found


def reconstruct(run: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """(the average of a length over the first `step` steps, or all up to the last snapshot; the step).

    Float32, with the names of a checkpoint. Raises UserError where the run has no snapshots.
    """
    snapshots = list_snapshots(run)
    if not snapshots:
        raise UserError(
            f"{run}: has no EMA snapshots up to its last checkpoint; they need --ema_lengths during training"
        )
    step = step or max(snapshot.step for snapshot in snapshots)
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if step not in {snapshot.step for snapshot in used}:
        steps = ", ".join(map(str, sorted({snapshot.step for snapshot in snapshots})[:5]))
        raise UserError(f"--step {step}: {run} has no EMA snapshot of this step; its first ones are of steps {steps}")
    weights = solve_weights(used, Snapshot(step, length))
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(used, weights, strict=True):
        try:
            with safe_open(snapshots[snapshot], "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    part = file.get_tensor(name).double() * weight
                    total[name] = total[name].add_(part) if name in total else part
        except (OSError, SafetensorError) as error:
            raise UserError(f"{snapshots[snapshot]}: is damaged ({error}); delete it") from None
    return {name: tensor.to(torch.float32) for name, tensor in total.items()}, step
