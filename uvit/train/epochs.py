"""Epochs in terms of the sample counter, which counts the samples of a whole run.

With N samples of data, epoch e has the counters e N .. (e + 1) N - 1. The data may change between two starts of a run.
Then the epochs before and after have different sizes. Nothing here knows steps or batches, so those may change freely.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np


@dataclass(frozen=True)
class EpochRange:
    """From the sample counter `first_sample` on, the epochs from `first_epoch` on have `size` samples each."""

    first_sample: int
    first_epoch: int
    size: int


def extend_epochs(ranges: list[EpochRange], samples: int, size: int) -> list[EpochRange]:
    """The ranges of a run that resumes at the sample counter `samples`, on data of `size` samples.

    More data: the epoch that has begun is finished without the new samples, and the next one has all. Less data: a new
    epoch begins at once, because the rest of the old one may be gone.
    """
    used = [each for each in ranges if each.first_sample < samples]
    if not used:
        return [EpochRange(0, 0, size)]
    last = used[-1]
    if last.size == size:
        return used
    begun = -(-(samples - last.first_sample) // last.size)  # epochs of the range, with the one that is not finished
    first_sample = last.first_sample + begun * last.size if size > last.size else samples
    return [*used, EpochRange(first_sample, last.first_epoch + begun, size)]


def locate_samples(ranges: list[EpochRange], counters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (epoch, position in the epoch, size of the epoch) of each counter; all (B,) int64."""
    which = np.searchsorted([each.first_sample for each in ranges], counters, side="right") - 1
    first_samples, first_epochs, sizes = np.array([astuple(each) for each in ranges])[which].T
    epochs, positions = np.divmod(counters - first_samples, sizes)
    return first_epochs + epochs, positions, sizes


def epochs_done(ranges: list[EpochRange], samples: int) -> float:
    """How many passes over the data the first `samples` samples are."""
    used = [each for each in ranges if each.first_sample <= samples][-1]
    return used.first_epoch + (samples - used.first_sample) / used.size


def samples_of_epochs(ranges: list[EpochRange], num_epochs: float) -> int:
    """The least sample counter at which `num_epochs` passes over the data are complete."""
    index = max(i for i, each in enumerate(ranges) if each.first_epoch <= num_epochs)
    first = ranges[index]
    # Rounded: 1.1 x 10 must not be a bit more than 11.
    end = first.first_sample + math.ceil(round((num_epochs - first.first_epoch) * first.size, 6))
    return max(1, min([end, *(each.first_sample for each in ranges[index + 1 :])]))
