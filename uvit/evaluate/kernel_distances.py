"""Distances of two sets of features by a kernel (squared MMD): KID and CMMD.

Everything is float64, on the device of the features, in tiles: memory does not depend on the number of images. Shapes:
N1 generated, N2 reference images, D features.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.evaluate.feature_sets import check_sets, tiles

KID_SEED = 2020

Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, D), (m, D) -> (n, m)


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3, that of KID (Binkowski et al. 2018)."""
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 * 10^2)), that of CMMD (Jayasumana et al. 2024)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp_(min=0).div_(-200).exp_()


def kid_of_subsets(
    generated: Tensor, reference: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = KID_SEED
) -> tuple[float, float]:
    """KID: the mean and the standard deviation of the unbiased MMD^2 of random subsets, drawn as torch-fidelity draws.

    The deviation is of a subset's value, not of the mean. Values slightly below 0 are normal for equal distributions.
    """
    check_sets(generated, reference, 2, "KID")
    fewest = min(len(generated), len(reference))
    if not 2 <= subset_size <= fewest:
        raise UserError(
            f"KID: subsets of {subset_size} images cannot be drawn from sets of {len(generated)} and {len(reference)}; "
            f"use a subset size of 2 to {fewest}, or give more images"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        x = generated[_choice(rng, generated, subset_size)].double()
        y = reference[_choice(rng, reference, subset_size)].double()
        values.append(_unbiased(x, y)[0].item())
    return float(np.mean(values)), float(np.std(values))


def kid(generated: Tensor, reference: Tensor) -> float:
    """KID of the whole sets: the unbiased MMD^2, without a random draw."""
    check_sets(generated, reference, 2, "KID")
    return _unbiased(generated, reference)[0].item()


def kid_interval(
    generated: Tensor, reference: Tensor, *, num_resamples: int = 1000, level: float = 0.95, seed: int = KID_SEED
) -> tuple[float, float, float]:
    """KID of the whole sets and the ends of its bootstrap interval (percentiles) over images of both sets.

    A resample counts each image as often as it is drawn. Pairs of an image with itself are left out, or an image that
    is drawn twice would count as its own perfect match. One pass over all pairs serves every resample.
    """
    check_sets(generated, reference, 2, "KID")
    rng = np.random.RandomState(seed)
    counts1 = _resample_counts(rng, generated, num_resamples)
    counts2 = _resample_counts(rng, reference, num_resamples)
    values = _unbiased(generated, reference, counts1, counts2).cpu().numpy()
    low, high = np.nanquantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(values[0]), float(low), float(high)


@torch.no_grad()
def cmmd(generated: Tensor, reference: Tensor) -> float:
    """1000 times the biased MMD^2, by a Gaussian kernel, of CLIP embeddings scaled to length 1. Never below 0."""
    check_sets(generated, reference, 1, "CMMD")
    x, y = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (generated, reference))
    sums = [_sum_of_pairs(a, b, gaussian_kernel) / (len(a) * len(b)) for a, b in ((x, x), (y, y), (x, y))]
    return max(0.0, 1000 * (sums[0] + sums[1] - 2 * sums[2]).item())


def _choice(rng: np.random.RandomState, rows: Tensor, size: int) -> Tensor:
    return torch.from_numpy(rng.choice(len(rows), size, replace=False)).to(rows.device)


def _resample_counts(rng: np.random.RandomState, rows: Tensor, num_resamples: int) -> Tensor:
    """How often each of n rows is in each resample: (n, 1 + num_resamples). The first column is the set itself."""
    n = len(rows)
    counts = np.ones((n, 1 + num_resamples), dtype=np.float32)
    for column in range(1, 1 + num_resamples):
        counts[:, column] = np.bincount(rng.randint(n, size=n), minlength=n)
    return torch.from_numpy(counts).to(rows.device)


@torch.no_grad()
def _unbiased(x: Tensor, y: Tensor, counts1: Tensor | None = None, counts2: Tensor | None = None) -> Tensor:
    """The unbiased MMD^2 by the cubic kernel, of each column of counts: (C,); of the sets themselves: (1,)."""
    within = []
    for rows, counts in ((x, counts1), (y, counts2)):
        n = len(rows)  # every resample has as many rows as the set
        pairs = n * (n - 1) if counts is None else n * n - counts.square().sum(0, dtype=torch.float64)
        within.append(_sum_of_pairs(rows, rows, cubic_kernel, counts, counts, off_diagonal=True) / pairs)
    return within[0] + within[1] - 2 * _sum_of_pairs(x, y, cubic_kernel, counts1, counts2) / (len(x) * len(y))


def _sum_of_pairs(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    counts1: Tensor | None = None,
    counts2: Tensor | None = None,
    off_diagonal: bool = False,
) -> Tensor:
    """Sum of count1 K(x, y) count2 over all pairs, for each column of the counts: (C,). Without counts: (1,)."""
    total = torch.zeros(1, dtype=torch.float64, device=x.device)
    for i, left in tiles(x):
        for j, right in tiles(y):
            if x is y and j < i:
                continue  # K is symmetric
            values = kernel(left, right)
            if off_diagonal and i == j:
                values.fill_diagonal_(0)
            if counts1 is None or counts2 is None:
                tile = values.sum()[None]
            else:
                weighted = values @ counts2[j : j + len(right)].double()
                tile = (counts1[i : i + len(left)] * weighted).sum(0)
            total = total + (2 * tile if x is y and j > i else tile)
    return total
