"""Two sets of features that are compared: checks, and walking through them in tiles."""

from collections.abc import Iterator

import torch
from torch import Tensor

from uvit.errors import UserError

TILE_ROWS = 2048  # a tile of 2,048 features is 32 MiB in float64


def check_sets(generated: Tensor, reference: Tensor, fewest: int, metric: str) -> None:
    """Raises UserError where sets (N1, D) and (N2, D) cannot be compared: other D, too few rows, NaN or infinity."""
    if generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"{metric}: the generated images have {generated.shape[1]} features each and the reference "
            f"{reference.shape[1]}; make both with one feature extractor"
        )
    for name, rows in (("generated", generated), ("reference", reference)):
        if len(rows) < fewest:
            raise UserError(f"{metric}: needs at least {fewest} {name} images, and there are {len(rows)}; give more")
        check_finite_features(rows, f"{metric}: of the {name} images")


def check_finite_features(rows: Tensor, where: str, first: int = 0) -> None:
    """Raises UserError that names the first row (N, D) with NaN or infinity. `first` is the number of row 0."""
    for start, part in enumerate(rows.split(TILE_ROWS)):
        bad = torch.nonzero(~torch.isfinite(part).all(1))
        if len(bad):
            raise UserError(
                f"{where}, number {first + start * TILE_ROWS + int(bad[0])} has features that are NaN or infinite; "
                "check the weights of the feature extractor, and compute in float32"
            )


def tiles(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of the first row, and up to TILE_ROWS rows in float64."""
    for start in range(0, len(rows), TILE_ROWS):
        yield start, rows[start : start + TILE_ROWS].double()
