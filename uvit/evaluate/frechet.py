"""Means and covariances of features, and the Frechet distance of two: FID, where Inception made the features.

Everything is float64 on the CPU. Shapes: N images, D features.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.evaluate.feature_sets import check_finite_features

ROWS_AT_ONCE = 1024  # a product of matrices reads and writes the (D, D) sum once, so take many rows at a time
EPS = torch.finfo(torch.float64).eps
CLEAR_RANK = 1e-5  # of the diagonal of a Cholesky factor; without full rank it is about 1e-8
ROOT_TOLERANCE = 1e-10  # relative


@dataclass(frozen=True)
class FeatureStatistics:
    """The mean (D,) and the covariance (D, D), float64. The covariance divides by N - 1.

    Attributes:
        num_images: N. None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None


@torch.no_grad()
def statistics_of(features: Tensor) -> FeatureStatistics:
    """Mean and covariance of features (N, D) of any float type; a file that is mapped into memory is read once.

    Squares are summed around the running mean (Chan, Golub and LeVeque 1983), so that a large mean costs no digits.
    Raises UserError where N < 2 or a value is not finite.
    """
    num_images, width = features.shape
    if num_images < 2:
        have = "1 image has" if num_images else "no images have"
        raise UserError(f"{have} no covariance, which a Frechet distance (FID) needs; give at least 2 images")
    check_finite_features(features, "of the images")
    seen = 0
    mean = torch.zeros(width, dtype=torch.float64)
    scatter = torch.zeros(width, width, dtype=torch.float64)  # the sum of (x - mean)(x - mean)^T over the rows seen
    for part in features.cpu().split(ROWS_AT_ONCE):
        rows = part.double()  # (n, D)
        n, own_mean = len(rows), rows.mean(0)
        step = own_mean - mean
        shift = step * math.sqrt(seen / (seen + n) * n)  # of the mean; it counts as one more row
        _add_gram(scatter, torch.cat([rows - own_mean, shift[None]]))
        mean += step * (n / (seen + n))
        seen += n
    return FeatureStatistics(mean, scatter / (num_images - 1), num_images)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """total += rows^T rows, of which only a triangle of blocks is computed."""
    width = rows.shape[1]
    size = max(256, math.ceil(width / 4))
    for a in range(0, width, size):
        for b in range(a, width, size):
            left, right = slice(a, a + size), slice(b, b + size)
            product = rows[:, left].T @ rows[:, right]
            total[left, right] += product
            if a != b:
                total[right, left] += product.T


# Distances


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); equal statistics give 0, and nothing is below 0.

    With S = R R^T, the trace of the root of S1 S2 is the sum of the singular values of R1^T R2. No root is taken of a
    rounding error, so covariances without full rank (fewer images than features) lose no digits either. Raises
    UserError where the two have different numbers of features.
    """
    if len(first.mean) != len(second.mean):
        raise UserError(
            f"statistics of {len(first.mean)} and of {len(second.mean)} features cannot be compared; make both with "
            "one feature extractor"
        )
    if torch.equal(first.mean, second.mean) and torch.equal(first.covariance, second.covariance):
        return 0.0
    return _distance(first.mean, _root(first.covariance), second.mean, _root(second.covariance))


def frechet_distance_at_infinity(
    features: Tensor, reference: FeatureStatistics, *, num_sizes: int = 15, smallest: int = 5000, seed: int = 2020
) -> float:
    """The distance for infinitely many images (Chong and Forsyth 2020: FID-infinity), from features (N, D).

    The bias of the distance is nearly proportional to 1/n. A line is fitted to the distances of random subsets of
    `num_sizes` sizes n, equally spaced from `smallest` (at most N/2) to N, and read off at 1/n = 0. It can be slightly
    below 0 for equal distributions.
    """
    total = len(features)
    sizes = np.unique(np.linspace(min(smallest, total // 2), total, num_sizes).astype(int))
    if len(sizes) < 2 or sizes[0] < 2:
        raise UserError(f"{total} images are too few to extrapolate the distance; give at least 4")
    rng = np.random.RandomState(seed)
    reference_root = _root(reference.covariance)
    distances = []
    for size in sizes:
        subset = statistics_of(features[torch.from_numpy(rng.choice(total, size, replace=False)).to(features.device)])
        distances.append(_distance(subset.mean, _root(subset.covariance), reference.mean, reference_root))
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def _root(covariance: Tensor) -> Tensor:
    """R (D, r) with R R^T = S. Eigenvalues within the rounding error of S are zero: r is the rank."""
    root, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = root.diagonal()
    if not failed and diagonal.min() > CLEAR_RANK * diagonal.max():
        return root
    values, vectors = torch.linalg.eigh(covariance)
    positive = values > values.abs().max() * len(values) * EPS
    return vectors[:, positive] * values[positive].sqrt()


def _distance(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    traces = root1.square().sum() + root2.square().sum()
    overlap = _sum_of_singular_values(root1.T @ root2) if root1.numel() and root2.numel() else torch.zeros(())
    return max(0.0, float((mean1 - mean2).square().sum() + traces - 2 * overlap))


def _sum_of_singular_values(matrix: Tensor) -> Tensor:
    """By the eigenvalues of M^T M, four times as fast, if their rounding errors hardly change the roots."""
    squares = torch.linalg.eigvalsh(matrix.T @ matrix)
    values = squares.clamp(min=0).sqrt()
    error = (EPS * squares.max() / (2 * values)).sum()  # of the roots, if each square is off by EPS of the largest
    return values.sum() if error < ROOT_TOLERANCE * values.sum() else torch.linalg.svdvals(matrix).sum()
