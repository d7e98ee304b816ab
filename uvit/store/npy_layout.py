import os
import re
from pathlib import Path

import numpy as np

from uvit.errors import UserError
from uvit.store.types import FeatureBatch

# The old layout


class NpyFeatures:
    """`train/{i}.npy` moments, `train/{i}_{k}.npy` context of caption k, `empty_context.npy` beside `train/`.

    It keeps neither captions, nor encoders' names, nor a latent scale.
    """

    def __init__(self, folder: Path, split: str = "train", flag: str = "feature_path"):
        self.folder, self.flag = folder / split, flag
        numbers = [0] * sum(1 for _ in self.folder.glob("*_0.npy"))
        pattern = re.compile(r"(\d+)(?:_(\d+))?\.npy")
        self.num_samples = 0
        for entry in os.scandir(self.folder):
            match = pattern.fullmatch(entry.name)
            if not match:
                continue
            if match[2] is None:
                self.num_samples += 1
            elif int(match[1]) < len(numbers):
                numbers[int(match[1])] += 1
        if len(numbers) != self.num_samples:
            raise UserError(
                f"--{flag} {folder}: {split}/ has {self.num_samples} moments, {len(numbers)} contexts;"
                " there must be i.npy and i_0.npy for each i"
            )
        self._num_captions = np.array(numbers)  # (pairs,)
        self.moments_shape: tuple[int, ...] = self._load(self.folder / "0.npy").shape
        context = self._load(self.folder / "0_0.npy")
        self.context_shape: tuple[int, ...] | None = context.shape
        self.num_tokens: int | None = context.shape[0]
        empty = folder / "empty_context.npy"
        if not empty.is_file():
            raise UserError(f"--{flag} {folder}: has no empty_context.npy, the context of the empty caption")
        self.empty_context: np.ndarray | None = self._load(empty, context.shape).astype(context.dtype)
        self.empty_token_ids: np.ndarray | None = None
        self.resolution: int | None = None
        self.latent_scale: float | None = None
        self.flipped = False
        self.vae_name: str | None = None
        self.vae_sha256: str | None = None
        self.text_encoder_name: str | None = None
        self.text_encoder_sha256: str | None = None
        self.tokenizer_name: str | None = None

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        """See Features."""
        assert flip_draws is None, "the old layout has no mirrored images"
        captions = np.minimum((caption_draws * self._num_captions[rows]).astype(np.int64), self._num_captions[rows] - 1)
        return FeatureBatch(
            moments=np.stack([self._load(self.folder / f"{i}.npy", self.moments_shape) for i in rows]),
            context=np.stack(
                [
                    self._load(self.folder / f"{i}_{k}.npy", self.context_shape)
                    for i, k in zip(rows, captions, strict=True)
                ]
            ),
            token_ids=None,
        )

    def captions(self, row: int) -> tuple[str, ...]:
        """None are kept."""
        return ()

    def _load(self, path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"--{self.flag}: {path} cannot be read as an array ({error})") from None
        if shape is not None and array.shape != shape:
            raise UserError(f"--{self.flag}: {path} has shape {array.shape}, and the others have {shape}")
        return array


NPY_NAME = re.compile(r"(\d+)(?:_(\d+))?\.npy")  # {i}.npy and {i}_{k}.npy
EMPTY_CONTEXT = "empty_context.npy"


# Reading the old layout


def num_captions(folder: Path) -> np.ndarray:
    """(pairs,): how many i_k.npy there are for each i.npy. Raises UserError where numbers are missing."""
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
            raise UserError(f"--path: {folder / missing} is missing; copy the folder again, or make it again")
    return np.array([len(captions[i]) for i in range(len(moments))])


def load_npy(path: Path) -> np.ndarray:
    """An array. Raises UserError where the file holds none."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--path: {path} cannot be read as an array ({error}); copy it again") from None
