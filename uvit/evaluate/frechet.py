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

ROWS_PER_UPDATE = 1024  # a product of matrices reads and writes the (D, D) sum once, so take many rows at a time
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


class RunningStatistics:
    """Mean and covariance of features that arrive in batches, in memory that does not depend on their number.

        statistics = RunningStatistics()
        for batch in batches:
            statistics.update(batch)
        statistics.result()

    Squares are summed around the running mean (Chan, Golub and LeVeque 1983), so that a large mean costs no digits. The
    result does not depend on how the rows are divided into batches, bit for bit.

    Attributes:
        num_images: rows seen.
        mean: (D,) of the rows that are summed.
        scatter: (D, D), the sum of (x - mean)(x - mean)^T over them.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self.num_summed = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)
        self.waiting: list[Tensor] = []  # rows that are not summed yet, fewer than ROWS_PER_UPDATE together

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add a batch (B, D) of any float type. Raises UserError if a value is NaN or infinite."""
        if features.ndim != 2 or (self.num_images and features.shape[1] != self._width()):
            raise ValueError(f"features of shape {tuple(features.shape)} after {self.num_images} rows")
        features = features.detach().cpu()
        check_finite_features(features, "of the images", self.num_images)
        self.num_images += len(features)
        while len(features):
            room = ROWS_PER_UPDATE - sum(map(len, self.waiting))
            self.waiting.append(features[:room].clone())
            features = features[room:]
            if sum(map(len, self.waiting)) == ROWS_PER_UPDATE:
                self._sum_waiting()

    def merge(self, other: "RunningStatistics") -> None:
        """Add what another one has seen, such as that of another process."""
        if not other.num_images:
            return
        self._sum_waiting()
        other._sum_waiting()
        if not self.num_images:
            self.mean, self.scatter = other.mean.clone(), other.scatter.clone()
        else:
            step = other.mean - self.mean
            both = self.num_summed + other.num_summed
            self.scatter += other.scatter
            self.scatter.addr_(step, step, alpha=self.num_summed / both * other.num_summed)
            self.mean += step * (other.num_summed / both)
        self.num_images += other.num_images
        self.num_summed += other.num_summed

    def result(self) -> FeatureStatistics:
        """Raises UserError where there are fewer than two images."""
        if self.num_images < 2:
            have = "1 image has" if self.num_images else "no images have"
            raise UserError(f"{have} no covariance, which a Frechet distance (FID) needs; give at least 2 images")
        self._sum_waiting()
        return FeatureStatistics(self.mean.clone(), self.scatter / (self.num_images - 1), self.num_images)

    def _width(self) -> int:
        return self.waiting[0].shape[1] if self.waiting else len(self.mean)

    def _sum_waiting(self) -> None:
        if not self.waiting:
            return
        rows = torch.cat(self.waiting).double()  # (n, D)
        self.waiting = []
        n, width = rows.shape
        if not self.num_summed:
            self.mean, self.scatter = torch.zeros(width).double(), torch.zeros(width, width).double()
        mean = rows.mean(0)
        step, both = mean - self.mean, self.num_summed + n
        rows -= mean
        rows = torch.cat([rows, step[None] * math.sqrt(self.num_summed / both * n)])  # the shift of the mean is a row
        _add_gram(self.scatter, rows)
        self.mean += step * (n / both)
        self.num_summed = both


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


def statistics_of(features: Tensor) -> FeatureStatistics:
    """Of features (N, D) at once. Raises UserError where N < 2 or a value is not finite."""
    running = RunningStatistics()
    running.update(features)
    return running.result()


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
