"""A batch is a function of (seed, sample counter): who reads it, and in what portions, makes no difference."""

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import array_features
from uvit.config.objective import ObjectiveConfig
from uvit.errors import UserError
from uvit.train.loader import (
    BatchDataset,
    flip_draws,
    permute,
    prefetch,
    prefetch_in_threads,
    random_draws,
    timestep_draws,
)


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


def samples(batches: BatchDataset, first: int, last: int, num_workers: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Every sample of items first..last-1: all tensors of each."""
    out = []
    for batch in prefetch(batches, range(first, last), num_workers, torch.device("cpu")):
        fields = (batch.moments, batch.context, batch.posterior_noise, batch.noise, batch.timesteps)
        out += list(zip(*(field for field in fields if field is not None), strict=True))
    return out


def equal(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_what_is_made_ahead_comes_in_order_and_its_errors_in_their_place(num_threads: int) -> None:
    def make(item: int) -> int:
        if item == 30:
            raise UserError("the 30th cannot be read")
        return item * item

    assert list(prefetch_in_threads(make, range(30), num_threads)) == [item * item for item in range(30)]
    made = prefetch_in_threads(make, range(100), num_threads)
    assert [next(made) for _ in range(30)] == [item * item for item in range(30)]
    with pytest.raises(UserError, match="30th"):
        next(made)


def test_no_thread_outlives_what_was_asked_for() -> None:
    before = threading.active_count()
    made = prefetch_in_threads(lambda item: item, range(1000), 2)
    next(made)
    made.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_batch_size_workers_and_start_do_not_change_the_samples() -> None:
    features = array_features(num_samples=37)
    reference = samples(BatchDataset(features, 12, seed=5), 0, 8)
    assert equal(samples(BatchDataset(features, 4, seed=5), 0, 24), reference)  # accumulation over three
    assert equal(samples(BatchDataset(features, 12, seed=5), 0, 8, num_workers=2), reference)
    assert equal(samples(BatchDataset(features, 12, seed=5), 5, 8), reference[60:])  # resumed at step 5
    assert not equal(samples(BatchDataset(features, 12, seed=6), 0, 8), reference)


def test_ranks_share_out_the_samples_of_a_step() -> None:
    """Two ranks that take every other item draw together what one draws."""
    features = array_features(num_samples=37)
    alone = samples(BatchDataset(features, 4, seed=5), 0, 6)
    halves = BatchDataset(features, 2, seed=5)
    ranks = [[sample for item in range(rank, 12, 2) for sample in samples(halves, item, item + 1)] for rank in (0, 1)]
    together = [sample for k in range(6) for rank in ranks for sample in rank[2 * k : 2 * k + 2]]
    assert equal(together, alone)


def test_each_sample_once_an_epoch() -> None:
    batches = BatchDataset(array_features(num_samples=30), 7, seed=1)
    rows = batches.rows(np.arange(90)).reshape(3, 30)
    for epoch in rows:
        assert np.array_equal(np.sort(epoch), np.arange(30))
    assert not np.array_equal(rows[0], rows[1])


def test_draws_have_their_distributions() -> None:
    draws = random_draws(np.arange(20_000), 3, (1, 2, 2))
    assert draws.timesteps.min() == 1 and draws.timesteps.max() == 1000
    assert draws.timesteps.mean() == pytest.approx(500.5, rel=0.02)
    assert draws.dropped.mean() == pytest.approx(0.1, abs=0.01)  # four standard errors
    for noise in (draws.noise, draws.posterior_noise):
        assert noise.mean() == pytest.approx(0, abs=0.02)
        assert noise.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(draws.noise.ravel(), draws.posterior_noise.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(draws.captions, draws.timesteps)[0, 1]) < 0.03


def test_timesteps_of_other_objectives_have_their_distributions() -> None:
    counters = np.arange(20_000)

    def levels(**flags: Any) -> np.ndarray:
        drawn = timestep_draws(counters, 3, ObjectiveConfig(path="linear", prediction_type="sample", **flags))
        assert drawn.dtype == np.float32 and drawn.min() > 0 and drawn.max() <= 1000
        return drawn / 1000

    uniform = levels()
    assert np.quantile(uniform, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.012)
    normal: dict[str, Any] = {"timestep_sampling": "logit_normal", "logit_mean": 0.8, "logit_std": 0.5}
    skewed = levels(**normal)
    logit = np.log(skewed / (1 - skewed))
    assert (logit.mean(), logit.std()) == (pytest.approx(0.8, abs=0.02), pytest.approx(0.5, abs=0.02))
    mixed = levels(**normal, uniform_share=0.25)
    assert (mixed == uniform).mean() == pytest.approx(0.25, abs=0.015)
    assert np.array_equal(mixed[mixed != uniform], skewed[mixed != uniform])
    shifted = levels(timestep_shift=3.0)
    np.testing.assert_allclose(shifted, 3 * uniform / (1 + 2 * uniform), rtol=1e-5)
    on_vp = timestep_draws(counters, 3, ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=-9.0))
    assert on_vp.min() == 1
    assert abs(np.corrcoef(uniform, random_draws(counters, 3, (1, 1, 1)).timesteps)[0, 1]) < 0.03


def test_other_timesteps_leave_the_rest_of_a_batch_as_it_is() -> None:
    features, linear = array_features(num_samples=30), ObjectiveConfig(path="linear", prediction_type="sample")
    one, other = BatchDataset(features, 8, seed=1)[2], BatchDataset(features, 8, seed=1, config=linear)[2]
    assert one.timesteps.dtype == torch.int64 and other.timesteps.dtype == torch.float32
    assert not torch.equal(one.timesteps, other.timesteps)
    for name in ("moments", "context", "posterior_noise", "noise"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_noise_offset_shifts_whole_channels_and_nothing_else() -> None:
    plain, shifted = (random_draws(np.arange(4), 3, (2, 8, 8), noise_offset=offset) for offset in (0.0, 0.5))
    shift = shifted.noise - plain.noise
    assert np.ptp(shift, axis=(2, 3)).max() < 1e-6 < np.abs(shift).min()
    assert np.array_equal(plain.posterior_noise, shifted.posterior_noise)


def test_dropped_captions_are_the_empty_one() -> None:
    features = array_features(num_samples=50)
    batches = BatchDataset(features, 200, seed=0)
    dropped = random_draws(np.arange(200), 0, (4, 4, 4)).dropped
    context = batches[0].context
    assert context is not None and features.empty_context is not None
    is_empty = (context.numpy() == features.empty_context).all(axis=(1, 2))
    assert np.array_equal(is_empty, dropped) and 5 < dropped.sum() < 40


# Mirrored images


def test_draws_are_what_they_always_were() -> None:
    """Frozen: whoever resumes a run after an update must see the same samples."""
    assert permute(np.arange(10), 10, 7, 3).tolist() == [9, 4, 1, 6, 8, 0, 2, 5, 3, 7]
    draws = random_draws(np.array([0, 1, 12_345_678]), 7, (1, 1, 2), noise_offset=0.5)
    assert draws.captions.tolist() == [0.36654848046680033, 0.41057189984767406, 0.3623913498760153]
    assert draws.dropped.tolist() == [False, True, False]
    assert draws.timesteps.tolist() == [848, 921, 380]
    posterior_noise = [0.9038419723510742, -0.3937721848487854, -0.4142695665359497]
    posterior_noise += [0.24358691275119781, 0.719606876373291, -0.9249201416969299]
    noise = [1.0277419090270996, -0.20545898377895355, -1.113846778869629]
    noise += [1.385039210319519, -0.5444176197052002, -0.7174884080886841]
    np.testing.assert_allclose(draws.posterior_noise.ravel(), posterior_noise, rtol=1e-6)
    np.testing.assert_allclose(draws.noise.ravel(), noise, rtol=1e-6)
    assert flip_draws(np.array([0, 1, 12_345_678]), 7).tolist() == [
        0.4821286018761155,
        0.20846739571851047,
        0.3020521886851666,
    ]
    skewed = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=0.8, uniform_share=0.25)
    drawn = timestep_draws(np.array([0, 1, 12_345_678]), 7, skewed)
    np.testing.assert_allclose(drawn, [888.5784912109375, 704.1201171875, 459.8966369628906], rtol=1e-6)


def test_mirrored_images_come_half_of_the_time_and_change_no_other_draw() -> None:
    plain, flipped = (
        BatchDataset(array_features(num_samples=2000, flipped=flip), 2000, seed=5)[1] for flip in (False, True)
    )
    is_mirrored = flipped.moments.sum((1, 2, 3)) < 0
    assert is_mirrored.float().mean() == pytest.approx(0.5, abs=0.05)  # over four standard errors
    assert torch.equal(flipped.moments.abs(), plain.moments)
    assert plain.context is not None and flipped.context is not None
    for name in ("context", "posterior_noise", "noise", "timesteps"):
        assert torch.equal(getattr(flipped, name), getattr(plain, name))


def test_flips_are_drawn_anew_at_each_visit_and_do_not_go_with_other_draws() -> None:
    counters = np.arange(20_000)
    flips, draws = flip_draws(counters, 3), random_draws(counters, 3, (1, 1, 1))
    assert flips.min() >= 0 and flips.max() < 1
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    for other in (draws.captions, draws.timesteps, draws.dropped, flip_draws(counters, 4), np.roll(flips, 1)):
        assert abs(np.corrcoef(flips, other)[0, 1]) < 0.03


def test_memory_stays_flat_over_an_epoch() -> None:
    batches = BatchDataset(array_features(num_samples=4000, size=16), 20, seed=5)
    batches[0]
    tracemalloc.start()
    try:
        for index in range(5):
            batches[index]
        held, peak = tracemalloc.get_traced_memory()
        for index in range(200):
            batches[index]
        held_after, peak_after = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_after - held < 20_000
    assert peak_after < 1.1 * peak


def test_noise_of_the_device_depends_on_the_sample_counter_only() -> None:
    """And leaves the samples, captions and timesteps as they are."""
    features, config = array_features(num_samples=30), ObjectiveConfig(noise_device="device", noise_offset=0.1)
    reference = samples(BatchDataset(features, 12, seed=5, config=config), 0, 8)
    assert equal(samples(BatchDataset(features, 4, seed=5, config=config), 0, 24, num_workers=2), reference)
    published = samples(BatchDataset(features, 12, seed=5), 0, 8)
    for ours, theirs in zip(reference, published, strict=True):
        same = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
        assert same == [True, True, False, False, True]  # all but posterior noise and noise
