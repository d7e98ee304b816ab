"""Whether an image is the one that its caption names: the nearest real images of a generated one.

For data whose captions name single images. Nearness is the cosine of the features.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from uvit.errors import UserError
from uvit.evaluate.feature_sets import check_sets, tiles
from uvit.evaluate.features import FeatureSet

NEAREST = 5
QUERIES_AT_ONCE = 256
ROUNDING = 1e-9  # of a cosine in float64


@dataclass(frozen=True)
class Retrieved:
    """For M generated images whose prompts name a real one.

    Attributes:
        rows: (M,), their rows among the generated features.
        ranks: (M,), how many real images are nearer than the one that the prompt names; 0 is right. Images of one
            distance (copies of one another) count as half nearer.
        nearest: (M, NEAREST), the rows of the nearest real features.
        cosines: (M, NEAREST), their similarity to the generated image.
    """

    rows: np.ndarray
    ranks: np.ndarray
    nearest: np.ndarray
    cosines: np.ndarray

    def top(self, k: int) -> float:
        """The share of images whose named image is among the k nearest."""
        return float((self.ranks < k).mean())


def retrieve(generated: FeatureSet, reference: FeatureSet) -> Retrieved:
    """Compare each generated image with all real ones. Raises UserError if no prompt names one of these."""
    mine, real = generated.tensor("features"), reference.tensor("features")
    check_sets(mine, real, 1, "retrieval")
    row_of = {id: row for row, id in enumerate(reference.ids)}
    rows = np.array([row for row, id in enumerate(generated.ids) if id in row_of], np.int64)
    if not len(rows):
        raise UserError(
            f"--metrics retrieval: no prompt names an image of --reference ({generated.ids[0]} is none); give the same "
            "source as --prompts and --reference"
        )
    named = torch.tensor([row_of[generated.ids[row]] for row in rows])
    ranks, nearest, cosines = [], [], []
    for part, its_named in zip(
        torch.from_numpy(rows).split(QUERIES_AT_ONCE), named.split(QUERIES_AT_ONCE), strict=True
    ):
        query = F.normalize(mine[part].double(), dim=1)
        similar = torch.cat([query @ F.normalize(tile, dim=1).T for _, tile in tiles(real)], dim=1)
        own = similar.gather(1, its_named[:, None])
        nearer, as_near = similar > own + ROUNDING, (similar - own).abs() <= ROUNDING
        ranks.append(nearer.sum(1) + (as_near.sum(1) - 1) / 2)
        best = similar.topk(min(NEAREST, len(real)), dim=1)
        nearest.append(best.indices)
        cosines.append(best.values)
    return Retrieved(rows, torch.cat(ranks).numpy(), torch.cat(nearest).numpy(), torch.cat(cosines).numpy())
