"""A batch is a function of (seed, sample counter): who reads it, and in what portions, makes no difference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import array_features
from uvit.data.loader import Batches, draw, load, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    positions = np.arange(1000)
    orders = [permute(positions, 1000, seed, epoch) for seed in (0, 1) for epoch in range(4)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).mean() < 0.01  # by chance one in 1000 stays


def test_the_order_has_no_pattern() -> None:
    """Neighbours in the order are far apart, as in a random permutation: a third of the size on average."""
    order = permute(np.arange(10_000), 10_000, 7, 0)
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.03)
    assert np.corrcoef(np.arange(10_000), order)[0, 1] == pytest.approx(0, abs=0.04)


def samples(batches: Batches, first: int, last: int, num_workers: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Every sample of items first..last-1: all tensors of each."""
    out = []
    for batch in load(batches, first, last, num_workers, torch.device("cpu")):
        fields = (batch.moments, batch.context, batch.posterior_noise, batch.noise, batch.timesteps)
        out += list(zip(*(field for field in fields if field is not None), strict=True))
    return out


def equal(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_batch_size_workers_and_start_do_not_change_the_samples() -> None:
    features = array_features(num_samples=37)
    reference = samples(Batches(features, 12, seed=5), 0, 8)
    assert equal(samples(Batches(features, 4, seed=5), 0, 24), reference)  # accumulation over three
    assert equal(samples(Batches(features, 12, seed=5), 0, 8, num_workers=2), reference)
    assert equal(samples(Batches(features, 12, seed=5), 5, 8), reference[60:])  # resumed at step 5
    assert not equal(samples(Batches(features, 12, seed=6), 0, 8), reference)


def test_ranks_share_out_the_samples_of_a_step() -> None:
    """Two ranks that take every other item draw together what one draws."""
    features = array_features(num_samples=37)
    alone = samples(Batches(features, 4, seed=5), 0, 6)
    halves = Batches(features, 2, seed=5)
    ranks = [[sample for item in range(rank, 12, 2) for sample in samples(halves, item, item + 1)] for rank in (0, 1)]
    together = [sample for k in range(6) for rank in ranks for sample in rank[2 * k : 2 * k + 2]]
    assert equal(together, alone)


def test_each_sample_once_an_epoch() -> None:
    batches = Batches(array_features(num_samples=30), 7, seed=1)
    rows = batches.rows(np.arange(90)).reshape(3, 30)
    for epoch in rows:
        assert np.array_equal(np.sort(epoch), np.arange(30))
    assert not np.array_equal(rows[0], rows[1])


def test_draws_have_their_distributions() -> None:
    draws = draw(np.arange(20_000), 3, (1, 2, 2))
    assert draws.timesteps.min() == 1 and draws.timesteps.max() == 1000
    assert draws.timesteps.mean() == pytest.approx(500.5, rel=0.02)
    assert draws.dropped.mean() == pytest.approx(0.1, abs=0.01)  # four standard errors
    for noise in (draws.noise, draws.posterior_noise):
        assert noise.mean() == pytest.approx(0, abs=0.02)
        assert noise.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(draws.noise.ravel(), draws.posterior_noise.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(draws.captions, draws.timesteps)[0, 1]) < 0.03


def test_noise_offset_shifts_whole_channels_and_nothing_else() -> None:
    plain, shifted = (draw(np.arange(4), 3, (2, 8, 8), noise_offset=offset) for offset in (0.0, 0.5))
    shift = shifted.noise - plain.noise
    assert np.ptp(shift, axis=(2, 3)).max() < 1e-6 < np.abs(shift).min()
    assert np.array_equal(plain.posterior_noise, shifted.posterior_noise)


def test_dropped_captions_are_the_empty_one() -> None:
    features = array_features(num_samples=50)
    batches = Batches(features, 200, seed=0)
    dropped = draw(np.arange(200), 0, (4, 4, 4)).dropped
    context = batches[0].context
    assert context is not None and features.empty_context is not None
    is_empty = (context.numpy() == features.empty_context).all(axis=(1, 2))
    assert np.array_equal(is_empty, dropped) and 5 < dropped.sum() < 40
