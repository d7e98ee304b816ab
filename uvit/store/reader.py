"""Features on disk, read a batch at a time: the feature store, and the old layout of one file for each array.

A split of a store is a folder: `manifest.json` says what there is, and shard i holds

    moments-0000i.npy     (rows, 2 C, h, w)
    flipped-0000i.npy     the same of the mirrored images, where they were wanted
    contexts-0000i.npy    (captions, T, D), and/or tokens-0000i.npy (captions, T)
    counts-0000i.npy      (rows,) int32, the number of captions of each pair
    captions-0000i.jsonl  a line for each pair: its id and captions

`empty_context.npy` and/or `empty_tokens.npy` are the empty caption's. `uvit.store.writer` writes all this.

Shapes: B batch, C latent channels, (h, w) latent size, T text tokens, D width of the context.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from uvit.errors import UserError
from uvit.store.arrays import OpenFiles, ReadRequest, ShardedArray, as_bytes, read_all, read_header
from uvit.store.manifest import read_manifest
from uvit.store.npy_layout import NpyFeatures
from uvit.store.types import FeatureBatch, Features


def open_features(path: str | Path, split: str = "train", flag: str = "feature_path") -> Features:
    """A split of a feature store, by its own folder or the one above, or of a folder in the old layout.

    Raises UserError, naming `flag`, where there is none, or it is damaged.
    """
    folder = Path(path).expanduser()
    if (folder / split / "manifest.json").is_file():
        return FeatureStore(folder / split, flag)
    if (folder / "manifest.json").is_file():
        store = FeatureStore(folder, flag)
        if split != (store.split or "train"):
            what = f"is the split {store.split}" if store.split else "is of version 1, which has no splits"
            raise UserError(f"--{flag} {folder}: {what}, and {split} is wanted; give the folder that holds {split}/")
        return store
    if (folder / split / "0.npy").is_file():
        return NpyFeatures(folder, split, flag)
    if not folder.is_dir():
        raise UserError(f"--{flag} {folder}: no such folder; make one with `uvit extract`")
    for begun in (folder / split, folder):
        if (begun / "settings.json").is_file():
            raise UserError(f"--{flag} {begun}: its extraction was not finished; run the same `uvit extract` again")
    if (folder / "0.npy").is_file():
        raise UserError(f"--{flag} {folder}: is part of a folder in the old layout; give {folder.absolute().parent}")
    if splits := sorted(path.parent.name for name in ("manifest.json", "0.npy") for path in folder.glob(f"*/{name}")):
        raise UserError(f"--{flag} {folder}: has no split {split}, only {', '.join(splits)}; `uvit extract` adds one")
    raise UserError(
        f"--{flag} {folder}: has neither {split}/manifest.json nor manifest.json nor {split}/0.npy;"
        " `uvit extract` makes features"
    )


# The feature store


class FeatureStore:
    """One split of a feature store. Opening it looks at every file's size and header; a pickled copy opens it anew."""

    def __init__(self, folder: Path, flag: str = "feature_path"):
        self.folder, self.flag = folder.absolute(), flag
        manifest = read_manifest(self.folder, self._error)
        self.manifest: dict[str, Any] = manifest.fields
        self.split = manifest.split
        self.num_samples = manifest.num_pairs
        self.moments_shape = manifest.moments_shape
        self.flipped = manifest.flipped
        self.context_shape = manifest.context_shape
        self.num_tokens: int | None = manifest.num_tokens
        self.latent_scale: float | None = manifest.latent_scale
        self.resolution = manifest.resolution
        self.vae_name, self.vae_sha256 = (manifest.encoder("vae", key) for key in ("name", "sha256"))
        self.text_encoder_name, self.text_encoder_sha256 = (
            manifest.encoder("text_encoder", key) for key in ("name", "sha256")
        )
        own_tokenizer = self.folder / "tokenizer"
        self.tokenizer_name = str(own_tokenizer) if own_tokenizer.is_dir() else manifest.encoder("tokenizer", "name")
        if self.num_samples == 0:
            raise self._error("holds no pairs; extract it again")
        self._files = manifest.files
        self._check_sizes()
        self._open_files = OpenFiles(self.folder)
        dtype, token_dtype = np.dtype(manifest.dtype), np.dtype(manifest.token_dtype or np.uint16)
        rows, captions = manifest.rows, manifest.captions
        self._moments = self._array("moments", rows, self.moments_shape, dtype)
        self._flipped = self._array("flipped", rows, self.moments_shape, dtype) if self.flipped else None
        self._contexts = self._tokens = self.empty_context = self.empty_token_ids = None
        if self.context_shape:
            self._contexts = self._array("contexts", captions, self.context_shape, dtype)
            self.empty_context = self._load("empty_context.npy", self.context_shape, dtype)
        if manifest.token_dtype:
            shape = (manifest.num_tokens,)
            self._tokens = self._array("tokens", captions, shape, token_dtype)
            self.empty_token_ids = self._load("empty_tokens.npy", shape, token_dtype)
        counts = [self._load(f"counts-{i:05d}.npy", (n,), np.dtype(np.int32)) for i, n in enumerate(rows)]
        for i, (count, num_captions) in enumerate(zip(counts, captions, strict=True)):
            if (count < 1).any() or count.sum() != num_captions:
                raise self._error(
                    f"counts-{i:05d}.npy and manifest.json disagree on the number of captions; extract it again"
                )
        self._first_caption = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])  # (pairs + 1,)

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        """See Features. Raises UserError where a file can no longer be read."""
        first, end = self._first_caption[rows], self._first_caption[rows + 1]
        captions = np.minimum(first + (caption_draws * (end - first)).astype(np.int64), end - 1)
        moments = self._moments.empty(len(rows))
        places = self._moments.places(rows, moments)
        if flip_draws is not None:
            assert self._flipped is not None, "mirrored images were not stored"
            mirrored = self._flipped.places(rows, moments)
            places = [
                flipped if draw < 0.5 else plain
                for plain, flipped, draw in zip(places, mirrored, flip_draws.tolist(), strict=True)
            ]
        context, token_ids = None, None
        if self._contexts is not None:
            context = self._contexts.empty(len(rows))
            places += self._contexts.places(captions, context)
        if self._tokens is not None:
            token_ids = self._tokens.empty(len(rows))
            places += self._tokens.places(captions, token_ids)
        try:
            read_all(self._open_files, places)
        except (OSError, EOFError) as error:
            raise self._error(f"{error}; copy it again, or extract it again") from None
        return FeatureBatch(moments, context, token_ids)

    def captions(self, row: int) -> tuple[str, ...]:
        """See Features."""
        return tuple(self._line(row)["captions"])

    def ids(self, row: int) -> str:
        """What the source calls a pair."""
        return self._line(row)["id"]

    def files(self) -> dict[str, dict[str, Any]]:
        """{name within the folder: {"bytes", "sha256"}}, all but the manifest itself."""
        return self._files

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path, str]]:
        return FeatureStore, (self.folder, self.flag)

    def _line(self, row: int) -> dict[str, Any]:
        shard, place = self._moments.find(row)
        return json.loads(_lines(self.folder / f"captions-{shard:05d}.jsonl")[place])

    def _check_sizes(self) -> None:
        for name, expected in self._files.items():
            try:
                size = os.stat(f"{self.folder}/{name}").st_size  # noqa: PTH116 - half the time of Path.stat
            except (OSError, ValueError):  # ValueError: a name that no file can have
                raise self._error(f"{name} is missing; copy the whole folder, or extract it again") from None
            if size != expected["bytes"]:
                raise self._error(
                    f"{name} has {size} bytes, not {expected['bytes']}; copy it again, or extract it again"
                )

    def _array(self, kind: str, lengths: list[int], shape: tuple[int, ...], dtype: np.dtype) -> ShardedArray:
        """The shards' arrays of one kind, each of them checked."""
        names = [f"{kind}-{i:05d}.npy" for i in range(len(lengths))]
        offsets = [self._header(name, (n, *shape), dtype) for name, n in zip(names, lengths, strict=True)]
        return ShardedArray(names, lengths, offsets, shape, dtype)

    def _load(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        offset = self._header(name, shape, dtype)
        array = np.empty(shape, dtype)
        read_all(self._open_files, [ReadRequest(name, offset, as_bytes(array))])
        return array

    def _header(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
        """Where an array's data begin, if it is one of this shape."""
        if name not in self._files:
            raise self._error(f"manifest.json is damaged: it does not list {name}; copy it again, or extract again")
        try:
            header = read_header(self._open_files, name)
        except (OSError, ValueError, EOFError) as error:
            raise self._error(f"{name} cannot be read ({error}); copy it again, or extract it again") from None
        if (header.shape, header.dtype, header.fortran_order) != (shape, dtype, False):
            order = " in Fortran order" if header.fortran_order else ""
            raise self._error(
                f"{name} holds {header.dtype} {header.shape}{order}, and by manifest.json {dtype} {shape};"
                " extract it again"
            )
        expected, num_bytes = header.offset + math.prod(shape) * dtype.itemsize, self._files[name]["bytes"]
        if num_bytes != expected:
            raise self._error(f"{name} has {num_bytes} bytes, not {expected}; copy it again, or extract it again")
        return header.offset

    def _error(self, what: str) -> UserError:
        return UserError(f"--{self.flag} {self.folder}: {what}")


@functools.lru_cache(maxsize=8)
def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()
