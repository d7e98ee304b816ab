"""Read features from disk, one batch at a time: from a feature store, or from `.npy` features (U-ViT layout).

A split of a store is a folder. `manifest.json` describes it, and shard i consists of

    moments-0000i.npy     (rows, 2 C, h, w)
    flipped-0000i.npy     the same for the mirrored images, with --random_flip
    images-0000i.npy      (rows, 3, H, W) uint8 in place of both, for a model on pixels
    teacher-0000i.npy     (rows, C', h', w') float16, the features of a vision model, with --teacher
    contexts-0000i.npy    (captions, T, D), the text embeddings; and/or
    tokens-0000i.npy      (captions, T), the token ids
    counts-0000i.npy      (rows,) int32, the number of captions of each pair
    captions-0000i.jsonl  one line for each pair: its id and captions

`empty_context.npy` and/or `empty_tokens.npy` belong to the empty caption. `uvit.store.writer` writes these files.

Shapes: B batch, C latent channels, (h, w) latent size, (H, W) pixels, T text tokens, D width of the text embeddings.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.store.arrays import OpenFiles, ReadRequest, ShardedArray, as_bytes, read_all, read_header
from uvit.store.manifest import read_manifest
from uvit.store.npy_layout import PREVIEW_PROMPTS, NpyFeatures
from uvit.store.types import FeatureBatch, Features


def open_features(path: str | Path, split: str = "train", flag: str = "feature_path") -> Features:
    """Open a split of a feature store (by its own folder or the folder above it) or of `.npy` features.

    Raises UserError, which names `flag`, if there is none or if it is damaged.
    """
    folder = Path(path)
    if (folder / split / "manifest.json").is_file():
        return FeatureStore(folder / split, flag)
    if (folder / "manifest.json").is_file():
        store = FeatureStore(folder, flag)
        if split != (store.split or "train"):
            what = f"is the split {store.split}" if store.split else "has format version 1, which has no splits"
            raise UserError(f"--{flag} {folder}: {what}, not {split}; give the folder that contains {split}/")
        return store
    if (folder / split / "0.npy").is_file():
        return NpyFeatures(folder, split, flag)
    if not folder.is_dir():
        raise UserError(f"--{flag} {folder}: no such folder; make one with `uvit extract`")
    for begun in (folder / split, folder):
        if (begun / "settings.json").is_file():
            raise UserError(f"--{flag} {begun}: its extraction is not finished; run the same `uvit extract` again")
    if (folder / "0.npy").is_file():
        raise UserError(f"--{flag} {folder}: is one split of .npy features; give {folder.absolute().parent}")
    splits = {path.parent.name for name in ("manifest.json", "0.npy") for path in folder.glob(f"*/{name}")}
    if names := ", ".join(sorted(splits - {PREVIEW_PROMPTS})):
        raise UserError(f"--{flag} {folder}: has no split {split}, only {names}; `uvit extract` adds one")
    raise UserError(
        f"--{flag} {folder}: contains no features (no {split}/manifest.json, manifest.json or {split}/0.npy);"
        " make some with `uvit extract`"
    )


class FeatureStore:
    """One split of a feature store. Opening it checks the size and header of every file. A pickled copy reopens it."""

    def __init__(self, folder: Path, flag: str = "feature_path"):
        self.folder, self.flag = folder.absolute(), flag
        manifest = read_manifest(self.folder, self._error)
        self.manifest: dict[str, Any] = manifest.fields
        self.split = manifest.split
        self.num_samples = manifest.num_pairs
        self.moments_shape, self.latents_shape = manifest.moments_shape, manifest.latents_shape
        self.is_pixels = manifest.images_shape is not None
        self.flipped = manifest.flipped
        self.teacher_shape, self.teacher_sha256 = manifest.teacher_shape, manifest.encoder("teacher", "sha256")
        self.context_shape = manifest.context_shape
        self.num_tokens: int | None = manifest.num_tokens
        self.latent_space: LatentSpace | None = manifest.latent_space
        self.resolution = manifest.resolution
        self.vae_name, self.vae_sha256 = (manifest.encoder("vae", key) for key in ("name", "sha256"))
        self.text_encoder_name, self.text_encoder_sha256 = (
            manifest.encoder("text_encoder", key) for key in ("name", "sha256")
        )
        own_tokenizer = self.folder / "tokenizer"
        self.tokenizer_sha256 = manifest.encoder("tokenizer", "sha256")
        self.tokenizer_name = str(own_tokenizer) if own_tokenizer.is_dir() else manifest.encoder("tokenizer", "name")
        if self.num_samples == 0:
            raise self._error("contains no pairs; extract it again")
        self._files = manifest.files
        self._check_sizes()
        self._open_files = OpenFiles(self.folder)
        dtype, token_dtype = np.dtype(manifest.dtype), np.dtype(manifest.token_dtype or np.uint16)
        rows, captions = manifest.rows, manifest.captions
        self._flipped = None
        if manifest.moments_shape is None:
            self._latents = self._array("images", rows, self.latents_shape, np.dtype(np.uint8))
        else:
            self._latents = self._array("moments", rows, manifest.moments_shape, dtype)
            self._flipped = self._array("flipped", rows, manifest.moments_shape, dtype) if self.flipped else None
        self._teacher = None
        if manifest.teacher_shape:
            self._teacher = self._array("teacher", rows, manifest.teacher_shape, np.dtype(np.float16))
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
                    f"counts-{i:05d}.npy and manifest.json give different numbers of captions; extract it again"
                )
        self._first_caption = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])  # (pairs + 1,)

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        """See Features. Raises UserError if a file can no longer be read."""
        captions = self.caption_items(rows, caption_draws)
        latents = self._latents.empty(len(rows))
        requests = self._latents.requests(rows, latents)
        if flip_draws is not None and not self.is_pixels:
            assert self._flipped is not None, "mirrored images were not stored"
            mirrored = self._flipped.requests(rows, latents)
            requests = [
                flipped if draw < 0.5 else plain
                for plain, flipped, draw in zip(requests, mirrored, flip_draws.tolist(), strict=True)
            ]
        context, token_ids = None, None
        if self._contexts is not None:
            context = self._contexts.empty(len(rows))
            requests += self._contexts.requests(captions, context)
        if self._tokens is not None:
            token_ids = self._tokens.empty(len(rows))
            requests += self._tokens.requests(captions, token_ids)
        self._read(requests)
        if not self.is_pixels:
            return FeatureBatch(latents, context, token_ids)
        if flip_draws is not None:
            mirror = flip_draws < 0.5
            latents[mirror] = latents[mirror, ..., ::-1]
        return FeatureBatch(None, context, token_ids, images=latents)

    def caption_items(self, rows: np.ndarray, caption_draws: np.ndarray) -> np.ndarray:
        """Which of all captions of the store the draws pick: (B,) int64."""
        first, end = self._first_caption[rows], self._first_caption[rows + 1]
        return np.minimum(first + (caption_draws * (end - first)).astype(np.int64), end - 1)

    def arrays(self) -> dict[str, ShardedArray]:
        """The stored arrays by kind: latents (moments or images), flipped, contexts, tokens, teacher."""
        found = {
            "latents": self._latents,
            "flipped": self._flipped,
            "contexts": self._contexts,
            "tokens": self._tokens,
            "teacher": self._teacher,
        }
        return {kind: array for kind, array in found.items() if array is not None}

    def read_files(self, array: ShardedArray) -> Iterator[np.ndarray]:
        """All items of an array, a file at a time. Raises UserError like `read`."""
        for name, offset, length in zip(array.names, array.offsets, array.lengths, strict=True):
            part = array.empty(length)
            self._read([ReadRequest(name, offset, as_bytes(part))])
            yield part

    def read_teacher(self, rows: np.ndarray) -> np.ndarray:
        """The teacher's features of the samples `rows`: (B, *teacher_shape) float16. Raises UserError like `read`."""
        assert self._teacher is not None, "no features of a teacher are stored"
        features = self._teacher.empty(len(rows))
        self._read(self._teacher.requests(rows, features))
        return features

    def captions(self, row: int) -> tuple[str, ...]:
        """See Features."""
        return tuple(self._line(row)["captions"])

    def ids(self, row: int) -> str:
        """The id that the source gave a pair."""
        return self._line(row)["id"]

    def files(self) -> dict[str, dict[str, Any]]:
        """{path within the folder: {"bytes", "sha256"}} of all files except the manifest."""
        return self._files

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path, str]]:
        return FeatureStore, (self.folder, self.flag)

    def _read(self, requests: list[ReadRequest]) -> None:
        try:
            read_all(self._open_files, requests)
        except (OSError, EOFError) as error:
            raise self._error(f"{error}; copy it again, or extract it again") from None

    def _line(self, row: int) -> dict[str, Any]:
        shard, index = self._latents.find(row)
        return json.loads(_lines(self.folder / f"captions-{shard:05d}.jsonl")[index])

    def _check_sizes(self) -> None:
        for name, expected in self._files.items():
            try:
                size = os.stat(f"{self.folder}/{name}").st_size  # noqa: PTH116 - takes half as long as Path.stat
            except (OSError, ValueError):  # ValueError: the name is not a valid file name
                raise self._error(f"{name} is missing; copy the whole folder, or extract it again") from None
            if size != expected["bytes"]:
                raise self._error(
                    f"{name} has {size} bytes, not {expected['bytes']}; copy it again, or extract it again"
                )

    def _array(self, kind: str, lengths: list[int], shape: tuple[int, ...], dtype: np.dtype) -> ShardedArray:
        """The arrays of one kind, of all shards. Checks each header."""
        names = [f"{kind}-{i:05d}.npy" for i in range(len(lengths))]
        offsets = [self._header(name, (n, *shape), dtype) for name, n in zip(names, lengths, strict=True)]
        return ShardedArray(names, lengths, offsets, shape, dtype)

    def _load(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        offset = self._header(name, shape, dtype)
        array = np.empty(shape, dtype)
        read_all(self._open_files, [ReadRequest(name, offset, as_bytes(array))])
        return array

    def _header(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
        """The byte where an array's data start. Raises UserError unless it has this shape and dtype."""
        if name not in self._files:
            raise self._error(f"manifest.json is damaged: it does not list {name}; copy it again, or extract again")
        try:
            header = read_header(self._open_files, name)
        except (OSError, ValueError, EOFError) as error:
            raise self._error(f"{name} cannot be read ({error}); copy it again, or extract it again") from None
        if (header.shape, header.dtype, header.fortran_order) != (shape, dtype, False):
            order = " in Fortran order" if header.fortran_order else ""
            raise self._error(
                f"{name} contains {header.dtype} {header.shape}{order}, but manifest.json says {dtype} {shape};"
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
