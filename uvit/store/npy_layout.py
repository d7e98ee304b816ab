"""`.npy` features (U-ViT layout): one file for each array, as the official U-ViT code and PaddleMIX write them.

    train/{i}.npy        the moments of pair i
    train/{i}_{k}.npy    the text embedding of its caption k
    empty_context.npy    the text embedding of the empty caption, beside the folders of the splits

This layout stores neither the captions as text, nor the encoders' names, nor the latent space, nor mirrored images.
"""

import os
import re
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.store.types import FeatureBatch

NPY_NAME = re.compile(r"(0|[1-9]\d*)(?:_(0|[1-9]\d*))?\.npy", re.ASCII)  # {i}.npy and {i}_{k}.npy
MARK = ".export.json"  # records which store a folder was exported from
EMPTY_CONTEXT = "empty_context.npy"
PREVIEW_PROMPTS = "run_vis"  # the official U-ViT code's pickled prompts, in a folder beside those of the splits


class NpyFeatures:
    """One split of `.npy` features, for training."""

    def __init__(self, folder: Path, split: str = "train", flag: str = "feature_path"):
        self.folder, self.flag = folder / split, flag
        self._num_captions = num_captions(self.folder, flag)
        self.num_samples = len(self._num_captions)
        self.moments_shape: tuple[int, ...] = load_npy(self.folder / "0.npy", flag).shape
        context = load_npy(self.folder / "0_0.npy", flag)
        for name, shape, num_axes in (("0.npy", self.moments_shape, 3), ("0_0.npy", context.shape, 2)):
            if len(shape) != num_axes or 0 in shape:
                raise UserError(f"--{flag}: {self.folder / name} has shape {shape}, which must have {num_axes} axes")
        if self.moments_shape[0] % 2:
            raise UserError(
                f"--{flag}: {self.folder / '0.npy'} has shape {self.moments_shape}, but moments are means and as many"
                " log-variances"
            )
        self.latents_shape = (self.moments_shape[0] // 2, *self.moments_shape[1:])
        self.is_pixels = False
        self.context_shape: tuple[int, ...] | None = context.shape
        self.num_tokens: int | None = context.shape[0]
        empty = folder / EMPTY_CONTEXT
        if not empty.is_file():
            raise UserError(f"--{flag} {folder}: has no {EMPTY_CONTEXT}, the text embedding of the empty caption")
        self.empty_context: np.ndarray | None = self._load(empty, context.shape).astype(context.dtype)
        self._check_sizes()
        self.empty_token_ids: np.ndarray | None = None
        self.resolution: int | None = None
        self.latent_space: LatentSpace | None = None
        self.flipped = False
        self.vae_name: str | None = None
        self.vae_sha256: str | None = None
        self.text_encoder_name: str | None = None
        self.text_encoder_sha256: str | None = None
        self.tokenizer_name: str | None = None
        self.tokenizer_sha256: str | None = None
        self.teacher_shape: tuple[int, ...] | None = None
        self.teacher_sha256: str | None = None

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        """See Features."""
        assert flip_draws is None, ".npy features have no mirrored images"
        counts = self._num_captions[rows]
        captions = np.minimum((caption_draws * counts).astype(np.int64), counts - 1)
        moments = [self._load(self.folder / f"{i}.npy", self.moments_shape) for i in rows]
        contexts = [
            self._load(self.folder / f"{i}_{k}.npy", self.context_shape) for i, k in zip(rows, captions, strict=True)
        ]
        return FeatureBatch(moments=np.stack(moments), context=np.stack(contexts), token_ids=None)

    def captions(self, row: int) -> tuple[str, ...]:
        """Always empty: this layout does not store captions as text."""
        return ()

    def _check_sizes(self) -> None:
        """Read the arrays whose files are not as large as those of pair 0: they are damaged, or of another type."""
        sizes = {name: (self.folder / name).stat().st_size for name in ("0.npy", "0_0.npy")}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := NPY_NAME.fullmatch(entry.name):
                    first = "0.npy" if match[2] is None else "0_0.npy"
                    if entry.stat().st_size != sizes[first]:
                        self._load(Path(entry.path), self.moments_shape if match[2] is None else self.context_shape)

    def _load(self, path: Path, shape: tuple[int, ...] | None) -> np.ndarray:
        array = load_npy(path, self.flag)
        if array.shape != shape:
            raise UserError(f"--{self.flag}: {path} has shape {array.shape}, but the others have {shape}")
        return array


def num_captions(folder: Path, flag: str = "path") -> np.ndarray:
    """(pairs,): the number of files i_k.npy for each i.npy. Raises UserError if a number is missing."""
    moments: set[int] = set()
    captions: dict[int, set[int]] = {}
    for entry in os.scandir(folder):
        if match := NPY_NAME.fullmatch(entry.name):
            if match[2] is None:
                moments.add(int(match[1]))
            else:
                captions.setdefault(int(match[1]), set()).add(int(match[2]))
    for i in range(max(moments | captions.keys()) + 1):
        numbers = captions.get(i, set())
        if i not in moments or numbers != set(range(max(1, len(numbers)))):
            missing = f"{i}.npy" if i not in moments else f"{i}_{min(set(range(len(numbers) + 1)) - numbers)}.npy"
            raise UserError(f"--{flag}: {folder / missing} is missing; copy the folder again, or extract it again")
    return np.array([len(captions[i]) for i in range(len(moments))])


def load_npy(path: Path, flag: str = "path") -> np.ndarray:
    """An array of numbers. Raises UserError if the file holds none."""
    try:
        with path.open("rb") as file:  # numpy leaves damaged files open
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile, SystemError) as error:  # SystemError: Python 3.11, odd nesting
        raise UserError(f"--{flag}: {path} cannot be read as an array ({error}); copy it again") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        what = array.dtype if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"--{flag}: {path} holds {what}, which must be one array of real numbers; make it again")
    return array
