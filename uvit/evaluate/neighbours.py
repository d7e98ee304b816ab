"""Precision, recall, density and coverage: which images lie within the balls around images of the other set.

The ball of an image reaches to its k-th neighbour in its own set. Kynkaanniemi et al. 2019 define precision and recall,
Naeem et al. 2020 density and coverage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.evaluate.feature_sets import check_sets, tiles

PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class Coverage:
    """Each within 0..1, but for the density, whose mean is 1 for equal distributions.

    Attributes:
        precision: the share of generated images in the ball of at least one reference image.
        recall: the share of reference images in the ball of at least one generated image.
        density: the number of balls of reference images around a generated image, divided by k; the mean.
        coverage: the share of reference images with at least one generated image in their ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def precision_recall_density_coverage(generated: Tensor, reference: Tensor, k: int = 5) -> Coverage:
    """Of features (N1, D) and (N2, D), on their device, in memory that does not depend on N1 and N2.

    Distances are products of matrices in float64. Those too close to a radius for that are computed again by
    differences, so that no rounding error decides: an image on the edge of a ball is inside, as is an exact copy.
    """
    if k < 1:
        raise UserError(f"precision and recall: k = {k} neighbours; use 1 or more")
    check_sets(generated, reference, k + 1, f"precision and recall with {k} neighbours")
    centre = reference.double().mean(0)
    radii1, radii2 = _squared_radii(generated, centre, k), _squared_radii(reference, centre, k)
    balls_around = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)  # of reference images
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=generated.device)
    covered = torch.zeros_like(recalled)
    for j, y in tiles(reference):
        for i, x in tiles(generated):
            squares, error = _squared_distances(x - centre, y - centre)
            in_reference = _within(squares, error, radii2[j : j + len(y)][None].expand_as(squares), x, y)
            in_generated = _within(squares, error, radii1[i : i + len(x)][:, None].expand_as(squares), x, y)
            balls_around[i : i + len(x)] += in_reference.sum(1)
            covered[j : j + len(y)] |= in_reference.any(0)
            recalled[j : j + len(y)] |= in_generated.any(0)
    return Coverage(
        precision=(balls_around > 0).double().mean().item(),
        recall=recalled.double().mean().item(),
        density=balls_around.double().mean().item() / k,
        coverage=covered.double().mean().item(),
    )


def _squared_radii(rows: Tensor, centre: Tensor, k: int) -> Tensor:
    """The squared distance of each row to its k-th nearest other row: (N,), float64."""
    radii = []
    for i, x in tiles(rows):
        nearest = torch.full((len(x), 0), torch.inf, dtype=torch.float64, device=rows.device)
        indices = torch.zeros(len(x), 0, dtype=torch.int64, device=rows.device)
        for j, y in tiles(rows):
            squares, _ = _squared_distances(x - centre, y - centre)
            if i == j:
                squares.fill_diagonal_(torch.inf)  # not oneself
            candidates = torch.cat([nearest, squares], dim=1)
            new = torch.arange(j, j + len(y), device=rows.device).expand(len(x), -1)
            nearest, order = candidates.topk(min(k, candidates.shape[1]), largest=False)
            indices = torch.cat([indices, new], dim=1).gather(1, order)
        left = torch.arange(i, i + len(x), device=rows.device)[:, None].expand_as(indices)
        exact = _exact_squares(rows, rows, left.reshape(-1), indices.reshape(-1)).view_as(indices)
        radii.append(exact.amax(1))
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """|x - y|^2 of all pairs (n, m), and a bound of its rounding error."""
    sums = x.square().sum(1)[:, None] + y.square().sum(1)
    return sums - 2 * x @ y.T, sums * (2 * (x.shape[1] + 8) * torch.finfo(torch.float64).eps)


def _within(squares: Tensor, error: Tensor, radii: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether |x - y|^2 <= radii, for all pairs."""
    inside = squares <= radii
    i, j = torch.nonzero((squares - radii).abs() <= error, as_tuple=True)
    inside[i, j] = _exact_squares(x, y, i, j) <= radii[i, j]
    return inside


def _exact_squares(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """|x[i] - y[j]|^2 by differences, the same bits for the same two rows."""
    parts = [
        (x[a].double() - y[b].double()).square().sum(1)
        for a, b in zip(i.split(PAIRS_AT_ONCE), j.split(PAIRS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)
