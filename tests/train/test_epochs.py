"""Epochs and the sample counter, on data that grows and shrinks."""

import numpy as np
import pytest

from uvit.train.epochs import EpochRange, epochs_done, extend_epochs, locate_samples, samples_of_epochs

TEN = [EpochRange(0, 0, 10)]


def test_the_same_data_changes_nothing() -> None:
    for samples in (0, 1, 9, 10, 11, 1000):
        assert extend_epochs(TEN, samples, 10) == TEN


def test_more_data_joins_at_the_next_epoch() -> None:
    for samples in (11, 15, 20):
        grown = extend_epochs(TEN, samples, 14)
        assert grown == [*TEN, EpochRange(20, 2, 14)]
        assert extend_epochs(grown, samples + 1 if samples < 20 else 20, 14) == grown  # and again, before it begins
        assert extend_epochs(grown, 21, 14) == grown
    assert extend_epochs(grown, 20, 10) == TEN  # taken back before it began
    assert extend_epochs(grown, 35, 20) == [*grown, EpochRange(48, 4, 20)]
    assert extend_epochs(TEN, 0, 14) == [EpochRange(0, 0, 14)]


def test_less_data_begins_a_new_epoch() -> None:
    less = extend_epochs(TEN, 15, 4)
    assert less == [*TEN, EpochRange(15, 2, 4)] == extend_epochs(less, 15, 4)
    assert extend_epochs(TEN, 20, 4) == [*TEN, EpochRange(20, 2, 4)]
    assert epochs_done(less, 14) == 1.4 and epochs_done(less, 15) == 2.0 and epochs_done(less, 17) == 2.5
    assert samples_of_epochs(less, 1.8) == 15 and samples_of_epochs(less, 2) == 15 and samples_of_epochs(less, 3) == 19


def test_counters_have_an_epoch_and_a_position() -> None:
    ranges = [EpochRange(0, 0, 3), EpochRange(6, 2, 4)]
    epochs, positions, sizes = (found.tolist() for found in locate_samples(ranges, np.arange(11)))
    assert epochs == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert positions == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0]
    assert sizes == [3] * 6 + [4] * 5


@pytest.mark.parametrize(
    ("num_epochs", "samples"), [(1e-8, 1), (0.1, 1), (1, 10), (1.01, 11), (1.1, 11), (2, 20), (2.5, 27), (3, 34)]
)
def test_the_end_of_a_number_of_epochs(num_epochs: float, samples: int) -> None:
    ranges = extend_epochs(TEN, 15, 14)
    assert samples_of_epochs(ranges, num_epochs) == samples
    assert epochs_done(ranges, samples) >= num_epochs > epochs_done(ranges, samples - 1)
