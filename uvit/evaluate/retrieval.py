"""The nearest real images of generated ones: what was memorised, and whether an image is the one that its prompt names.

Nearness is the cosine of the features; centered, that of their differences to the mean of the real images' features.
Features that are never negative, as after a ReLU, have cosines close to 1 unless they are centered.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uvit.errors import UserError
from uvit.evaluate.feature_sets import check_sets, tiles
from uvit.evaluate.features import FeatureSet
from uvit.evaluate.prompts import Prompt

NEAREST = 5
ROUNDING = 1e-6  # of the cosine of features in float32: the twin of an image is not nearer than the image
SIMILARITIES, FEWEST_QUERIES = 2**23, 64  # at once: 64 MiB in float64, unless there are very many real images


def retrieval_ranks(
    generated: FeatureSet, reference: FeatureSet, prompts: Sequence[Prompt], centered: bool = False
) -> np.ndarray:
    """How many real images are nearer than the one that the prompt names, for each generated image whose prompt names
    one; 0 is right.

    A prompt names its own image, and those of equal prompts; the nearest of these counts. A copy of it is not nearer.

    Args:
        prompts: of all images of the generated set.

    Raises UserError if no prompt names an image of the reference.
    """
    mine, real = generated.tensor("features"), reference.tensor("features")
    check_sets(mine, real, 1, "retrieval")
    row_of = {id: row for row, id in enumerate(reference.ids)}
    named_by: dict[str, list[int]] = {}
    for prompt in prompts:
        if prompt.image in row_of:
            named_by.setdefault(prompt.text, []).append(row_of[prompt.image])
    rows = [row for row, position in enumerate(generated.rows) if prompts[position].image in row_of]
    if not rows:
        raise UserError(
            f"--metrics retrieval: no prompt names an image of --reference ({prompts[0].text!r} does not); give the "
            "same source or feature store as --prompts and --reference (of COCO the folder, not the captions alone)"
        )
    named = [named_by[prompts[generated.rows[row]].text] for row in rows]
    centre = mean_of(real) if centered else None
    ranks = []
    for part in torch.arange(len(rows)).split(max(FEWEST_QUERIES, SIMILARITIES // len(real))):
        query = mine[[rows[i] for i in part]]
        similar = torch.cat([similarities for _, similarities in _similarities(query, real, centre)], 1)
        own = torch.zeros_like(similar, dtype=torch.bool)
        for row, i in enumerate(part):
            own[row, named[i]] = True
        nearest_own = similar.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append((similar > nearest_own + ROUNDING).sum(1))
    return torch.cat(ranks).numpy()


def nearest_images(generated: Tensor, reference: Tensor, centered: bool = False) -> tuple[Tensor, Tensor]:
    """(M, D) and (N, D) -> rows of the real images that are nearest, the nearest first, and cosines: (M, NEAREST)."""
    rows = torch.empty(len(generated), 0, dtype=torch.int64)
    cosines = torch.empty(len(generated), 0, dtype=torch.float64)
    for start, similar in _similarities(generated, reference, mean_of(reference) if centered else None):
        numbers = torch.arange(start, start + similar.shape[1]).expand_as(similar)
        rows, cosines = torch.cat([rows, numbers], 1), torch.cat([cosines, similar], 1)
        cosines, order = cosines.topk(min(NEAREST, cosines.shape[1]))
        rows = rows.gather(1, order)
    return rows, cosines


def mean_of(rows: Tensor) -> Tensor:
    """(N, D) -> (D,), float64, in tiles."""
    return torch.stack([tile.sum(0) for _, tile in tiles(rows)]).sum(0) / len(rows)


def _similarities(generated: Tensor, reference: Tensor, centre: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The cosines (M, n) of all generated images and some real ones, with the row of the first of these."""
    shift = 0.0 if centre is None else centre
    query = F.normalize(generated.double() - shift, dim=1)
    for start, tile in tiles(reference):
        yield start, query @ F.normalize(tile - shift, dim=1).T
