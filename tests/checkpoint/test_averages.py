"""Power-function averages: their definition, and averages of other lengths as sums of snapshots."""

from pathlib import Path

import numpy as np
import pytest
import torch

from uvit.checkpoint.averages import (
    Snapshot,
    decay_of,
    gamma_of,
    inner_product,
    list_snapshots,
    reconstruct,
    solve_weights,
    write_snapshot,
)
from uvit.errors import UserError

STEPS, EVERY = 400, 20
SNAPSHOTS = [Snapshot(step, length) for step in range(EVERY, STEPS + 1, EVERY) for length in (0.05, 0.1)]


def averages(values: np.ndarray, length: float) -> np.ndarray:
    """(T, N) -> the average after each step, as training keeps it."""
    found, average = [], np.zeros(values.shape[1])
    for step, value in enumerate(values, start=1):
        decay = decay_of(length, step)
        average = decay * average + (1 - decay) * value
        found.append(average)
    return np.stack(found)


def test_exponents_of_the_paper_s_lengths() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
def test_the_length_is_the_spread_of_the_weights_over_time(length: float) -> None:
    weights = averages(np.eye(STEPS), length)[-1]
    time = (np.arange(STEPS) + 0.5) / STEPS
    mean = (weights * time).sum()
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(length, rel=0.01)


def test_an_update_of_several_steps_stands_for_them() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=(STEPS // 10, 3)), 10, axis=0)  # equal within ten steps
    average = np.zeros(3)
    for step in range(10, STEPS + 1, 10):
        decay = decay_of(0.1, step, 10)
        average = decay * average + (1 - decay) * values[step - 1]
    np.testing.assert_allclose(average, averages(values, 0.1)[-1], rtol=1e-12)


def test_inner_products_are_those_of_the_weights() -> None:
    rows = {snapshot: averages(np.eye(STEPS), snapshot.length)[snapshot.step - 1] for snapshot in SNAPSHOTS[-4:]}
    for a in rows:
        for b in rows:
            assert inner_product(a, b) == pytest.approx(rows[a] @ rows[b], rel=2e-3)  # steps against a continuum


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_a_length_that_was_kept_is_its_snapshot(length: float) -> None:
    weights = solve_weights(SNAPSHOTS, Snapshot(STEPS, length))
    wanted = [float(snapshot == Snapshot(STEPS, length)) for snapshot in SNAPSHOTS]
    np.testing.assert_allclose(weights, wanted, atol=1e-12)


@pytest.mark.parametrize(("length", "tolerance"), [(0.04, 3e-3), (0.07, 1e-3), (0.15, 1e-3), (0.2, 5e-3)])
def test_other_lengths_come_near_to_averages_that_were_kept(length: float, tolerance: float) -> None:
    """Relative to how far the average is from the last weights, for a random walk."""
    values = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 50)), axis=0)
    kept = {length: averages(values, length) for length in (0.05, 0.1)}
    weights = solve_weights(SNAPSHOTS, Snapshot(STEPS, length))
    found = sum(weight * kept[s.length][s.step - 1] for weight, s in zip(weights, SNAPSHOTS, strict=True))
    wanted = averages(values, length)[-1]
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(values[-1] - wanted)
    assert weights.sum() == pytest.approx(1)


def test_snapshots_on_disk_need_a_checkpoint_after_them(tmp_path: Path) -> None:
    write_snapshot(tmp_path, Snapshot(20, 0.05), {"x": torch.ones(2)})
    assert [path.name for path in (tmp_path / "ema").iterdir()] == ["step-00000020-0.05.safetensors"]
    assert list_snapshots(tmp_path) == {}
    with pytest.raises(UserError, match="has no EMA snapshots up to its last checkpoint"):
        reconstruct(tmp_path, 0.05)
