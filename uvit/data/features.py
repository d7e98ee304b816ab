"""Features on disk, read a batch at a time: the feature store, and the old layout of one file for each array.

A store is a folder: `manifest.json` says what there is, and shard i holds

    moments-0000i.npy     (rows, 2 C, h, w)
    contexts-0000i.npy    (captions, T, D), and/or tokens-0000i.npy (captions, T)
    counts-0000i.npy      (rows,) int32, the number of captions of each pair
    captions-0000i.jsonl  a line for each pair: its id and captions

`empty_context.npy` and/or `empty_tokens.npy` are the empty caption's. `uvit.data.store` writes all this.

Shapes: B batch, C latent channels, (h, w) latent size, T text tokens, D width of the context.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uvit.data.types import FeatureBatch
from uvit.errors import UserError

FORMAT, VERSION = "uvit features", 1


class Features(Protocol):
    """Moments, and contexts or token ids, of a data set."""

    num_samples: int
    moments_shape: tuple[int, ...]  # (2 C, h, w)
    context_shape: tuple[int, ...] | None  # (T, D); None where only token ids are stored
    num_tokens: int | None  # T
    latent_scale: float | None  # None: not known
    resolution: int | None  # side of the images, in pixels; None: not known
    empty_context: np.ndarray | None  # (T, D), as stored
    empty_token_ids: np.ndarray | None  # (T,)
    vae_name: str | None  # where the encoders were found, for uvit.data.encoders to load
    text_encoder_name: str | None
    tokenizer_name: str | None

    def read(self, rows: np.ndarray, caption_draws: np.ndarray) -> FeatureBatch:
        """Samples `rows`, (B,) int64, each with the caption that its draw, (B,) in [0, 1), picks.

        The arrays are the caller's to change.
        """
        ...

    def captions(self, row: int) -> tuple[str, ...]:
        """The captions of a sample as text; none where they were not stored."""
        ...


def open_features(path: str | Path, split: str = "train") -> Features:
    """A feature store, or a folder in the old layout, of which `split` is read.

    Raises UserError where it is neither, or is damaged.
    """
    folder = Path(path).expanduser()
    if (folder / "manifest.json").is_file():
        if split != "train":
            raise UserError(
                f"--feature_path {folder}: a feature store has no splits; extract {split} into one of its own"
            )
        return FeatureStore(folder)
    if (folder / split / "0.npy").is_file():
        return OldLayout(folder, split)
    if not folder.is_dir():
        raise UserError(f"--feature_path {folder}: no such folder; make one with `uvit extract`")
    if (folder / "settings.json").is_file():
        raise UserError(f"--feature_path {folder}: its extraction was not finished; run the same `uvit extract` again")
    if (folder / "0.npy").is_file():
        raise UserError(
            f"--feature_path {folder}: is part of a folder in the old layout; give {folder.absolute().parent}"
        )
    raise UserError(
        f"--feature_path {folder}: has neither manifest.json nor {split}/0.npy; `uvit extract` makes features"
    )


# The feature store


class FeatureStore:
    """A feature store, memory-mapped. May be pickled: the copy maps the files again."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.manifest = self._read_manifest()
        try:
            self.num_samples = int(self.manifest["num_pairs"])
            self.moments_shape: tuple[int, ...] = tuple(self.manifest["moments_shape"])
            context_shape = self.manifest["context_shape"]
            self.context_shape: tuple[int, ...] | None = tuple(context_shape) if context_shape else None
            self.num_tokens: int | None = int(self.manifest["num_tokens"])
            self.latent_scale: float | None = float(self.manifest["latent_scale"])
            self.resolution: int | None = self.manifest["source"].get("resolution")
            self.vae_name = self._encoder("vae")
            self.text_encoder_name = self._encoder("text_encoder")
            self.tokenizer_name = self._encoder("tokenizer")
            self._rows = [int(shard["rows"]) for shard in self.manifest["shards"]]
            self._captions = [int(shard["captions"]) for shard in self.manifest["shards"]]
            self._kinds = self._stored_kinds()
            self._check_sizes()
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise self._error(f"manifest.json is damaged ({type(error).__name__}: {error})") from None
        if self.num_samples == 0 or sum(self._rows) != self.num_samples:
            raise self._error(f"manifest.json counts {self.num_samples} pairs, and {sum(self._rows)} in its shards")
        dtype = np.dtype(self.manifest["dtype"])
        self.empty_context: np.ndarray | None = None
        self.empty_token_ids: np.ndarray | None = None
        if self.context_shape:
            self.empty_context = np.array(self._open("empty_context.npy", self.context_shape, dtype))
        if self.manifest["token_dtype"]:
            token_dtype = np.dtype(self.manifest["token_dtype"])
            self.empty_token_ids = np.array(self._open("empty_tokens.npy", (self.num_tokens or 0,), token_dtype))
        counts = [self._open(f"counts-{i:05d}.npy", (rows,), np.dtype(np.int32)) for i, rows in enumerate(self._rows)]
        self._first_caption = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])  # (pairs + 1,)
        if self._first_caption[-1] != sum(self._captions):
            raise self._error(
                "its counts files and its manifest.json disagree on the number of captions; extract it again"
            )
        self._first_row_of_shard = np.cumsum([0, *self._rows[:-1]])
        self._first_caption_of_shard = np.cumsum([0, *self._captions[:-1]])
        _ = self._arrays  # a damaged file shows now

    def read(self, rows: np.ndarray, caption_draws: np.ndarray) -> FeatureBatch:
        """See Features."""
        first, end = self._first_caption[rows], self._first_caption[rows + 1]
        captions = np.minimum(first + (caption_draws * (end - first)).astype(np.int64), end - 1)
        return FeatureBatch(
            moments=_gather(self._arrays["moments"], self._first_row_of_shard, rows),
            context=_gather(self._arrays["contexts"], self._first_caption_of_shard, captions)
            if "contexts" in self._kinds
            else None,
            token_ids=_gather(self._arrays["tokens"], self._first_caption_of_shard, captions)
            if "tokens" in self._kinds
            else None,
        )

    def captions(self, row: int) -> tuple[str, ...]:
        """See Features."""
        shard = int(np.searchsorted(self._first_row_of_shard, row, side="right")) - 1
        line = _lines(self.folder / f"captions-{shard:05d}.jsonl")[row - int(self._first_row_of_shard[shard])]
        return tuple(json.loads(line)["captions"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    @functools.cached_property
    def _arrays(self) -> dict[str, list[np.ndarray]]:
        """The shards' arrays of each kind, mapped once in a process."""
        return {
            kind: [
                self._open(f"{kind}-{i:05d}.npy", ((rows if kind == "moments" else captions), *shape), dtype)
                for i, (rows, captions) in enumerate(zip(self._rows, self._captions, strict=True))
            ]
            for kind, (shape, dtype) in self._kinds.items()
        }

    def _stored_kinds(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        dtype = np.dtype(self.manifest["dtype"])
        kinds = {"moments": (self.moments_shape, dtype)}
        if self.context_shape:
            kinds["contexts"] = (self.context_shape, dtype)
        if self.manifest["token_dtype"]:
            kinds["tokens"] = ((int(self.manifest["num_tokens"]),), np.dtype(self.manifest["token_dtype"]))
        return kinds

    def _encoder(self, name: str) -> str | None:
        """Its name; `tokenizer` may be the store's own folder of that name."""
        if name == "tokenizer" and (self.folder / "tokenizer").is_dir():
            return str(self.folder / "tokenizer")
        return self.manifest[name]["name"] if self.manifest[name] else None

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._error(f"manifest.json cannot be read ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self._error("manifest.json is not a feature store's")
        version = manifest.get("version")
        if version != VERSION:
            raise self._error(
                f"its format is version {version}, this uvit reads {VERSION}; update uvit, or extract again"
            )
        return manifest

    def _check_sizes(self) -> None:
        files = dict(self.manifest["files"])
        for shard in self.manifest["shards"]:
            files |= shard["files"]
        for name, expected in files.items():
            try:
                size = os.stat(self.folder / name).st_size  # noqa: PTH116 - half the time of Path.stat
            except OSError:
                raise self._error(f"{name} is missing; copy the whole folder, or extract it again") from None
            if size != expected["bytes"]:
                raise self._error(
                    f"{name} has {size} bytes, not {expected['bytes']}; copy it again, or extract it again"
                )

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        try:
            array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._error(f"{name} cannot be read ({error})") from None
        if array.shape != shape or array.dtype != dtype:
            raise self._error(f"{name} holds {array.dtype} {array.shape}, and by manifest.json {dtype} {shape}")
        return np.asarray(array)  # a plain view: indexing a memmap itself costs several times as much

    def _error(self, what: str) -> UserError:
        return UserError(f"--feature_path {self.folder}: {what}")


def _gather(shards: list[np.ndarray], first: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Items `indices` of arrays that follow one another, (B,) -> (B, ...).

    A copy for each item measures faster than fancy indexing a shard at a time, which copies everything twice.
    """
    out = np.empty((len(indices), *shards[0].shape[1:]), shards[0].dtype)
    shard = np.searchsorted(first, indices, side="right") - 1
    for i, (s, j) in enumerate(zip(shard.tolist(), (indices - first[shard]).tolist(), strict=True)):
        out[i] = shards[s][j]
    return out


@functools.lru_cache(maxsize=8)
def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


# The old layout


class OldLayout:
    """`train/{i}.npy` moments, `train/{i}_{k}.npy` context of caption k, `empty_context.npy` beside `train/`.

    It keeps neither captions, nor encoders' names, nor a latent scale.
    """

    def __init__(self, folder: Path, split: str = "train"):
        self.folder = folder / split
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
                f"--feature_path {folder}: {split}/ has {self.num_samples} moments, {len(numbers)} contexts;"
                " there must be i.npy and i_0.npy for each i"
            )
        self._num_captions = np.array(numbers)  # (pairs,)
        self.moments_shape: tuple[int, ...] = self._load(self.folder / "0.npy").shape
        context = self._load(self.folder / "0_0.npy")
        self.context_shape: tuple[int, ...] | None = context.shape
        self.num_tokens: int | None = context.shape[0]
        empty = folder / "empty_context.npy"
        if not empty.is_file():
            raise UserError(f"--feature_path {folder}: has no empty_context.npy, the context of the empty caption")
        self.empty_context: np.ndarray | None = self._load(empty, context.shape).astype(context.dtype)
        self.empty_token_ids: np.ndarray | None = None
        self.resolution: int | None = None
        self.latent_scale: float | None = None
        self.vae_name: str | None = None
        self.text_encoder_name: str | None = None
        self.tokenizer_name: str | None = None

    def read(self, rows: np.ndarray, caption_draws: np.ndarray) -> FeatureBatch:
        """See Features."""
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
            raise UserError(f"--feature_path: {path} cannot be read as an array ({error})") from None
        if shape is not None and array.shape != shape:
            raise UserError(f"--feature_path: {path} has shape {array.shape}, and the others have {shape}")
        return array
