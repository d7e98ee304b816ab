"""Writing a feature store, any shard by any process, so that it can be stopped anywhere and gone on with.

`settings.json` keeps what the extraction was told; whoever goes on or joins in must be told the same. Shards are
independent of one another: `uvit.store.shard` writes them. The manifest comes last.
"""

import contextlib
import fcntl
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvit.errors import UserError
from uvit.io import write_bytes, write_json, write_json_once
from uvit.store.manifest import STORE_FORMAT, VERSION
from uvit.store.shard import ArrayInfo, ShardWriter, committed_row, file_records, read_record, record_name


@dataclass(frozen=True)
class StoreInfo:
    """How features were made: the head of the manifest."""

    num_source_pairs: int | None  # None: a stream's, not known beforehand
    shard_size: int  # source pairs in each shard but the last; what was left out of them is not stored
    dtype: str  # of moments and contexts: float16 or float32
    moments_shape: tuple[int, ...]  # (2 C, h, w)
    flipped: bool  # moments of the mirrored images are stored as well
    context_shape: tuple[int, ...] | None  # (T, D); None: contexts are not stored
    num_tokens: int  # T
    token_dtype: str | None  # uint16 or int32; None: token ids are not stored
    latent_scale: float
    split: str
    source: dict[str, Any]  # where the pairs were and how images became squares
    vae: dict[str, str] | None  # {"name": folder or hub id, "sha256": fingerprint}
    text_encoder: dict[str, str] | None
    tokenizer: dict[str, str] | None

    def arrays(self) -> dict[str, ArrayInfo]:
        """What a shard holds."""
        dtype = np.dtype(self.dtype)
        arrays = {"moments": ArrayInfo(self.moments_shape, dtype)}
        if self.flipped:
            arrays["flipped"] = arrays["moments"]
        if self.context_shape:
            arrays["contexts"] = ArrayInfo(self.context_shape, dtype, per_caption=True)
        if self.token_dtype:
            arrays["tokens"] = ArrayInfo((self.num_tokens,), np.dtype(self.token_dtype), per_caption=True)
        return {**arrays, "counts": ArrayInfo((), np.dtype(np.int32))}


class StoreWriter:
    """Writes one split, into a folder that is named after it.

    Raises UserError where the folder holds anything but this very extraction, half done or done.
    """

    def __init__(self, folder: Path, info: StoreInfo):
        self.folder, self.info = folder, info
        refuse_earlier_layouts(folder)
        settings = json.loads(json.dumps(asdict(info)))  # as it reads back: tuples are lists
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / "settings.json"
        if not place.is_file():
            strangers = any(not path.name.startswith(".") for path in folder.iterdir())
            if strangers and not place.is_file():  # another process may have begun in this instant
                raise UserError(f"--output_dir {folder}: is not empty and no feature store; choose another folder")
            write_json_once(place, settings, indent=1)
        there = read_record(place)
        if differing := first_difference(there, settings):
            raise UserError(
                f"--output_dir {folder}: was begun with other settings ({differing}); give the same ones to go on, or"
                " another folder"
            )

    @property
    def complete(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    @property
    def num_source_pairs(self) -> int | None:
        """None: a stream whose end nobody has reached yet."""
        if self.info.num_source_pairs is not None:
            return self.info.num_source_pairs
        end = self.folder / "stream-end.json"
        return read_record(end)["num_source_pairs"] if end.is_file() else None

    @property
    def num_shards(self) -> int | None:
        """None where that is not known yet."""
        pairs = self.num_source_pairs
        return None if pairs is None else -(-pairs // self.info.shard_size)

    def rows(self, shard: int) -> range:
        """The source's rows that a shard deals with; of a stream whose end is not known, as if it were far."""
        start, pairs = shard * self.info.shard_size, self.num_source_pairs
        stop = start + self.info.shard_size
        return range(start, stop if pairs is None else min(stop, pairs))

    def done(self, shard: int) -> bool:
        return (self.folder / record_name(shard)).is_file()

    def next_row(self, shard: int) -> int:
        """The first source row of a shard that is not yet dealt with, as far as it is kept for good."""
        rows = self.rows(shard)
        if self.done(shard):
            return rows.stop
        row = committed_row(self.folder, shard, rows)
        return rows.start if row is None else row

    def open_shard(self, shard: int) -> ShardWriter:
        """To be entered as a context; goes on after what was committed before."""
        return ShardWriter(self.folder, shard, self.rows, self.info.arrays())

    def end_stream(self, num_source_pairs: int) -> None:
        """Record how many pairs the stream turned out to have. Raises UserError if it had another number before."""
        write_json_once(self.folder / "stream-end.json", {"num_source_pairs": num_source_pairs}, indent=1)
        if self.num_source_pairs != num_source_pairs:
            raise UserError(
                f"--output_dir {self.folder}: the source had {self.num_source_pairs} pairs and now has"
                f" {num_source_pairs}; give the same source, or another folder"
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process is in here for this store; waits for its turn."""
        with (self.folder / "settings.json").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finish(
        self, empty_context: np.ndarray | None, empty_token_ids: np.ndarray | None, num_shards: int | None = None
    ) -> None:
        """All shards are done: add the empty caption's features, (T, D) and (T,), the problems and the manifest.

        Raises UserError where no pair is left.
        """
        number = self.num_shards if num_shards is None else num_shards
        assert number is not None, "the end of the stream is not known"
        shards = [read_record(self.folder / record_name(shard)) for shard in range(number)]
        with self.alone():
            if not self.complete:
                self._finish(shards, empty_context, empty_token_ids)
            for path in self.folder.glob(".*"):  # what kills left behind
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _finish(
        self, shards: list[dict[str, Any]], empty_context: np.ndarray | None, empty_token_ids: np.ndarray | None
    ) -> None:
        files = []
        problems = [problem for shard in shards for problem in shard.pop("problems")]
        if problems:
            lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
            write_bytes(self.folder / "problems.jsonl", "".join(lines).encode())
            files.append(self.folder / "problems.jsonl")
        num_pairs = sum(shard["rows"] for shard in shards)
        if not num_pairs:
            raise UserError(
                f"--source: all {len(problems)} pairs were left out, as {self.folder / 'problems.jsonl'} says"
                if problems
                else "--source: holds no pairs"
            )
        for name, array in (("empty_context.npy", empty_context), ("empty_tokens.npy", empty_token_ids)):
            if array is not None:
                write_bytes(self.folder / name, _npy(array))
                files.append(self.folder / name)
        files += sorted(path for path in (self.folder / "tokenizer").glob("*") if path.is_file())
        manifest = {
            "format": STORE_FORMAT,
            "version": VERSION,
            **asdict(self.info),
            "num_pairs": num_pairs,
            "num_captions": sum(shard["captions"] for shard in shards),
            "problems": dict(sorted(Counter(problem["kind"] for problem in problems).items())),
            "num_left_out": sum(problem["left_out"] for problem in problems),
            "files": file_records(files, self.folder),
            "shards": shards,
        }
        write_json(self.folder / "manifest.json", manifest, indent=1)


def refuse_earlier_layouts(folder: Path) -> None:
    """Raises UserError where the folder of a split lies in a store or a folder without splits of earlier versions."""
    root = folder.parent
    for name in ("manifest.json", "settings.json"):
        if (root / name).is_file():
            raise UserError(
                f"--output_dir {root}: holds a feature store of an earlier version, which has no splits; choose another"
                " folder (training still reads that one)"
            )
    if (folder / "0.npy").is_file() or (root / "empty_context.npy").is_file():
        raise UserError(
            f"--output_dir {root}: holds features in the old layout, a file for each array; choose another folder"
            " (training still reads that one)"
        )


def first_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first setting that differs, and how; empty where none does."""
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if a != b:
            if isinstance(a, dict) and isinstance(b, dict):
                return f"{key}: {first_difference(a, b)}"
            return f"{key}: {a} there, {b} here"
    return ""


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()
