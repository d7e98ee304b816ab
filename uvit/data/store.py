"""Writing a feature store, a shard at a time, so that it can be stopped anywhere and gone on with.

A shard's files are written aside and renamed, then `shard-0000i.json` records them: what has a record is
whole. The manifest comes last. `settings.json` keeps what the extraction was told; a resumed one must be told
the same.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uvit.data.features import FORMAT, VERSION
from uvit.errors import UserError


@dataclass(frozen=True)
class StoreInfo:
    """How features were made: the head of the manifest."""

    num_pairs: int
    shard_size: int  # pairs in each shard but the last
    dtype: str  # of moments and contexts: float16 or float32
    moments_shape: tuple[int, ...]  # (2 C, h, w)
    context_shape: tuple[int, ...] | None  # (T, D); None: contexts are not stored
    num_tokens: int  # T
    token_dtype: str | None  # uint16 or int32; None: token ids are not stored
    latent_scale: float
    source: dict[str, Any]
    vae: dict[str, str]  # {"name": folder or hub id, "sha256": fingerprint}
    text_encoder: dict[str, str] | None
    tokenizer: dict[str, str] | None


@dataclass(frozen=True)
class EncodedPairs:
    """Some pairs as features; their captions follow one another."""

    ids: list[str]  # b
    captions: list[tuple[str, ...]]  # b, in all c captions
    moments: np.ndarray  # (b, 2 C, h, w)
    contexts: np.ndarray | None  # (c, T, D)
    token_ids: np.ndarray | None  # (c, T)


class StoreWriter:
    """Raises UserError where the folder holds anything but this very extraction, half done or done."""

    def __init__(self, folder: Path, info: StoreInfo):
        self.folder, self.info = folder, info
        self.num_shards = -(-info.num_pairs // info.shard_size)
        settings = json.loads(json.dumps(asdict(info)))  # as it reads back: tuples are lists
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "settings.json").is_file():
            there = _read(folder / "settings.json")
            if differing := sorted(
                key for key in settings.keys() | there.keys() if settings.get(key) != there.get(key)
            ):
                key = differing[0]
                raise UserError(
                    f"--output_dir {folder}: was begun with other settings ({key}: {there.get(key)} there,"
                    f" {settings.get(key)} here); give the same ones to go on, or another folder"
                )
        elif any(path for path in folder.iterdir() if not path.name.startswith(".settings.json")):
            raise UserError(f"--output_dir {folder}: is not empty and no feature store; choose another folder")
        else:
            _write_json(folder / "settings.json", settings)

    @property
    def complete(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    @property
    def next_shard(self) -> int:
        """The first shard that is not there yet; `num_shards` when all are."""
        missing = (i for i in range(self.num_shards) if not (self.folder / f"shard-{i:05d}.json").is_file())
        return next(missing, self.num_shards)

    def rows(self, shard: int) -> range:
        """The pairs of a shard."""
        start = shard * self.info.shard_size
        return range(start, min(start + self.info.shard_size, self.info.num_pairs))

    def write_shard(self, shard: int, parts: Iterable[EncodedPairs]) -> None:
        """Write what `parts` yield, as they yield it."""
        dtype, tokens = np.dtype(self.info.dtype), self.info.token_dtype
        arrays = {"moments": _GrowingArray(self._path("moments", shard), self.info.moments_shape, dtype)}
        if self.info.context_shape:
            arrays["contexts"] = _GrowingArray(self._path("contexts", shard), self.info.context_shape, dtype)
        if tokens:
            arrays["tokens"] = _GrowingArray(self._path("tokens", shard), (self.info.num_tokens,), np.dtype(tokens))
        counts = arrays["counts"] = _GrowingArray(self._path("counts", shard), (), np.dtype(np.int32))
        lines = []
        try:
            for part in parts:
                arrays["moments"].append(part.moments)
                if part.contexts is not None:
                    arrays["contexts"].append(part.contexts)
                if part.token_ids is not None:
                    arrays["tokens"].append(part.token_ids)
                counts.append(np.array([len(captions) for captions in part.captions]))
                for id, captions in zip(part.ids, part.captions, strict=True):
                    lines.append(json.dumps({"id": id, "captions": captions}, ensure_ascii=False) + "\n")
            assert counts.length == len(self.rows(shard))
            for array in arrays.values():
                array.finish()
        finally:
            for array in arrays.values():
                array.file.close()
        captions_file = self.folder / f"captions-{shard:05d}.jsonl"
        _write(captions_file, "".join(lines).encode())
        files = [*(array.path for array in arrays.values()), captions_file]
        num_captions = sum(len(json.loads(line)["captions"]) for line in lines)
        record = {"rows": counts.length, "captions": num_captions, "files": _describe(files)}
        _write_json(self.folder / f"shard-{shard:05d}.json", record)

    def finish(self, empty_context: np.ndarray | None, empty_token_ids: np.ndarray | None) -> None:
        """Add the empty caption's features, (T, D) and (T,), and the manifest."""
        files = []
        for name, array in (("empty_context.npy", empty_context), ("empty_tokens.npy", empty_token_ids)):
            if array is not None:
                path = self.folder / name
                growing = _GrowingArray(path, array.shape[1:], array.dtype)
                growing.append(array)
                growing.finish()
                files.append(path)
        files += sorted(path for path in (self.folder / "tokenizer").glob("*") if path.is_file())
        shards = [_read(self.folder / f"shard-{i:05d}.json") for i in range(self.num_shards)]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self.info),
            "num_captions": sum(shard["captions"] for shard in shards),
            "files": _describe(files, self.folder),
            "shards": shards,
        }
        _write_json(self.folder / "manifest.json", manifest)

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / f"{kind}-{shard:05d}.npy"


class _GrowingArray:
    """An .npy whose length is known at the end: NumPy's header leaves room for the first axis to grow."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.shape, self.dtype = path, shape, dtype
        self.aside = path.with_name(f".{path.name}.partial")
        self.file: BinaryIO = self.aside.open("wb")
        self.length = 0
        self._write_header()

    def append(self, items: np.ndarray) -> None:
        """(n, *shape), of a type that fits."""
        assert items.shape[1:] == self.shape, (items.shape, self.shape)
        self.file.write(np.ascontiguousarray(items, dtype=self.dtype).data)
        self.length += len(items)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


def _describe(files: Iterable[Path], folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """{name: size and checksum}."""
    described: dict[str, dict[str, Any]] = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix() if folder else path.name
        described[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return described


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"--output_dir {path.parent}: {path.name} is damaged; remove it to do that part again"
        ) from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
