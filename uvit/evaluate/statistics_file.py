"""Means and covariances of features as `.npz` files: ours, and those of pytorch-fid, clean-fid, ADM and dgm-eval.

Ours has the arrays of pytorch-fid, `mu` and `sigma`, so that other code reads it too; and `n`, `extractor`,
`weights_hash` and `recipe` (JSON), so that it is compared only with what the same extractor made; and
`images` (JSON), which says what they were made of. No file can run code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvit.errors import UserError, differences
from uvit.evaluate.extractors import Extractor
from uvit.evaluate.frechet import FeatureStatistics, statistics_of
from uvit.io import write_atomically

SYMMETRY_TOLERANCE = 1e-4  # of the largest variance: files in float32 round, and other code rounds otherwise


@dataclass(frozen=True)
class SavedStatistics:
    """What a file holds. `extractor`, `weights_hash` and `recipe` are None where it does not say."""

    path: Path
    statistics: FeatureStatistics
    extractor: str | None = None
    weights_hash: str | None = None
    recipe: Mapping[str, Any] | None = None
    images: Mapping[str, Any] | None = None


def is_statistics(name: str) -> bool:
    """Whether --model or --reference names a file of statistics."""
    return name.lower().endswith(".npz")


def write_statistics(
    path: Path, statistics: FeatureStatistics, extractor: Extractor, images: Mapping[str, Any] | None = None
) -> None:
    """Write atomically; an existing file is replaced. `images` describes what they were made of."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: statistics are written as .npz; use a name that ends so")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as aside, aside.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            n=np.array(-1 if statistics.num_images is None else statistics.num_images),
            extractor=np.array(extractor.name),
            weights_hash=np.array(extractor.weights_hash),
            recipe=np.array(json.dumps(dict(extractor.recipe), sort_keys=True)),
            images=np.array(json.dumps(dict(images or {}))),
        )


def read_statistics(path: Path) -> SavedStatistics:
    """Of dgm-eval's files, which hold features, they are computed. Raises UserError where a file holds neither."""
    arrays = _read_arrays(path)
    if "mu" in arrays and "sigma" in arrays:
        statistics = _checked(path, arrays)
    elif "reps" in arrays and arrays["reps"].ndim == 2:
        statistics = statistics_of(torch.from_numpy(arrays["reps"]))
    else:
        raise UserError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, not the arrays mu and sigma; give statistics as "
            "pytorch-fid writes them, or images"
        )
    try:
        recipe, images = (json.loads(str(arrays[key])) if key in arrays else None for key in ("recipe", "images"))
    except ValueError:
        raise UserError(f"{path}: its recipe is not JSON; make the file again") from None
    extractor, weights_hash = (str(arrays[name]) if name in arrays else None for name in ("extractor", "weights_hash"))
    return SavedStatistics(path, statistics, extractor, weights_hash, recipe, images)


def check_same_features(saved: SavedStatistics, extractor: Extractor) -> None:
    """Raises UserError where the features of a file are not those of an extractor, as far as the file says."""
    found, wanted = len(saved.statistics.mean), extractor.width
    if saved.extractor not in (None, extractor.name):
        problem = f"was made with {saved.extractor}, and the images are evaluated with {extractor.name}"
    elif saved.weights_hash not in (None, extractor.weights_hash):
        problem = (
            f"was made with other weights of {extractor.name} (SHA-256 {str(saved.weights_hash)[:8]}, not "
            f"{extractor.weights_hash[:8]})"
        )
    elif saved.recipe is not None and json.dumps(saved.recipe, sort_keys=True) != json.dumps(
        dict(extractor.recipe), sort_keys=True
    ):
        problem = f"was made from images that {extractor.name} prepared otherwise ({json.dumps(saved.recipe)})"
    elif found != wanted:
        problem = f"has {found} features, and {extractor.name} has {wanted}"
    else:
        return
    raise UserError(f"{saved.path}: {problem}; use one extractor for both")


def check_same_origin(first: SavedStatistics, second: SavedStatistics) -> None:
    """Raises UserError where two files are of other features, as far as they say."""
    for what in ("extractor", "weights_hash", "recipe"):
        one, other = getattr(first, what), getattr(second, what)
        if None not in (one, other) and one != other:
            raise UserError(
                f"{second.path}: was made with another network or input than {first.path}; use one extractor for both",
                list(differences({what: one}, {what: other}, ("in the first", "in the second")).values()),
            )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`, but those that would need a pickle, such as dgm-eval's `hparams`."""
    arrays = {}
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            for name in file if isinstance(file, Mapping) else ():  # a .npy is a single array
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
        return arrays
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give statistics (.npz) or images") from None
    except Exception as error:  # damaged bytes raise errors of any type
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path}: is damaged, or is no .npz of arrays ({reason}); make it again") from None


def _checked(path: Path, arrays: Mapping[str, np.ndarray]) -> FeatureStatistics:
    """Raises UserError where mu and sigma are no mean and covariance."""
    mu, sigma = arrays["mu"], arrays["sigma"]
    numbers = mu.dtype.kind in "fiu" and sigma.dtype.kind in "fiu"
    if not numbers or mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f"{path}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape} are no mean and covariance; make "
            "the file again"
        )
    mean, covariance = torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64))
    tolerance = SYMMETRY_TOLERANCE * covariance.diagonal().abs().max()
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all())
    if not finite or (covariance - covariance.T).abs().max() > tolerance:
        problem = "is not symmetric" if finite else "or mu holds NaN or infinity"
        raise UserError(f"{path}: sigma {problem}; make the file again")
    covariance = (covariance + covariance.T) / 2
    shifted = covariance + tolerance * torch.eye(len(mu), dtype=torch.float64)
    if tolerance > 0 and torch.linalg.cholesky_ex(shifted).info != 0:
        raise UserError(f"{path}: sigma has negative eigenvalues, so it is no covariance; make the file again")
    n = int(arrays["n"]) if "n" in arrays and arrays["n"].ndim == 0 else -1
    return FeatureStatistics(mean, covariance, n if n > 0 else None)
