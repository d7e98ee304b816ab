"""Write one shard of a feature store. A kill at any moment loses seconds of work and nothing else.

A shard is written in a folder of its own, `.partial-0000i/`:

    lock                 held by the process that writes this shard
    moments-0000i.npy    and the other files of the shard, under their final names
    progress.json        the last commit; on resuming, the files are truncated to the sizes in it
    shard-0000i.json     the shard's record, written when its files are complete; what remains is to rename them

The record is renamed last, so a shard that has a record is complete.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvit.errors import UserError
from uvit.io import file_sha256, read_json, sync_path, write_json
from uvit.sources.types import Problem


@dataclass(frozen=True)
class EncodedPairs:
    """The features of b pairs with c captions in total. The captions of a pair follow one another."""

    ids: list[str]  # b
    captions: list[tuple[str, ...]]  # b
    moments: np.ndarray | None  # (b, 2 C, h, w)
    flipped: np.ndarray | None  # (b, 2 C, h, w), of the mirrored images
    contexts: np.ndarray | None  # (c, T, D)
    token_ids: np.ndarray | None  # (c, T)
    problems: tuple[Problem, ...] = ()  # of these pairs, and of the pairs between them that were skipped
    num_truncated: int | None = None  # captions of which the last tokens are cut off; None: not known
    counts: list[int] | None = None  # b: captions per pair, if their text is not known and `captions` has empty tuples
    images: np.ndarray | None = None  # (b, 3, H, W) uint8, in place of moments
    teacher: np.ndarray | None = None  # (b, C, h, w) float16, features of a vision model


@dataclass(frozen=True)
class ArrayInfo:
    """An array of a shard. Its first axis counts pairs or captions."""

    shape: tuple[int, ...]  # of one item
    dtype: np.dtype
    per_caption: bool = False


class ShardWriter:
    """A context manager that holds the lock of the shard, and commits on exit what was appended.

    `next_row` is the first source row that is not yet processed. `rows(number)` gives the source rows of a shard.
    Raises UserError if another process is writing this shard.
    """

    def __init__(self, folder: Path, number: int, rows: Callable[[int], range], arrays: dict[str, ArrayInfo]):
        self.folder, self.number = folder, number
        self.partial = folder / f".partial-{number:05d}"
        self.next_row = rows(number).start
        self._rows = rows
        self._arrays = {f"{kind}-{number:05d}.npy": array for kind, array in arrays.items()}
        self._captions_file = f"captions-{number:05d}.jsonl"
        self._record = self.partial / record_name(number)
        self._num_pairs = self._num_captions = self._caption_bytes = 0
        self._num_truncated: int | None = 0
        self._problems: list[Problem] = []
        self._committed = -1  # next_row at the last commit
        self._files: dict[str, io.FileIO] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as opening:
            opening.enter_context(self._lock())
            if committed_row(self.folder, self.number, self._rows(self.number)) is None:
                for path in self.partial.iterdir():
                    if path.name != "lock":
                        path.unlink()
            if self._record.is_file():  # some of its files may already have been renamed
                self.next_row = self._rows(self.number).stop
            else:
                self._load_progress()
                for name, size in self._sizes().items():
                    file = (self.partial / name).open("r+b" if self._committed >= 0 else "x+b", buffering=0)
                    self._files[name] = opening.enter_context(file)
                    file.truncate(size)
                    file.seek(size)
            self._open = opening.pop_all()
        return self

    def append(self, part: EncodedPairs, next_row: int) -> None:
        """Add pairs. The source rows before `next_row` are then processed. The next commit makes them permanent."""
        counts = part.counts or [len(captions) for captions in part.captions]
        lines = [
            json.dumps({"id": id, "captions": captions}, ensure_ascii=False) + "\n"
            for id, captions in zip(part.ids, part.captions, strict=True)
        ]
        items = {
            "moments": part.moments,
            "images": part.images,
            "flipped": part.flipped,
            "teacher": part.teacher,
            "contexts": part.contexts,
            "tokens": part.token_ids,
            "counts": np.array(counts, dtype=np.int32),
        }
        for name, array in self._arrays.items():
            values = items[name.partition("-")[0]]
            expected = (sum(counts) if array.per_caption else len(part.ids), *array.shape)
            assert values is not None, name
            assert values.shape == expected, (name, values.shape, expected)
            _write_all(self._files[name], np.ascontiguousarray(values, dtype=array.dtype).reshape(-1).view(np.uint8))
        text = "".join(lines).encode()
        _write_all(self._files[self._captions_file], np.frombuffer(text, dtype=np.uint8))
        self._num_pairs += len(part.ids)
        self._num_captions += sum(counts)
        self._num_truncated = _sum(self._num_truncated, part.num_truncated)
        self._caption_bytes += len(text)
        self._problems += part.problems
        self.next_row = next_row

    def commit(self) -> None:
        """Make everything appended so far survive a kill or a power cut."""
        if not self._files or self.next_row == self._committed:
            return
        self._sync()
        progress = {
            "next_row": self.next_row,
            "rows": self._num_pairs,
            "captions": self._num_captions,
            "truncated_captions": self._num_truncated,
            "bytes": self._sizes(),
            "problems": [asdict(problem) for problem in self._problems],
        }
        write_json(self.partial / "progress.json", progress, indent=1)
        self._committed = self.next_row

    def finish(self) -> None:
        """Move the shard to its final place. All of its rows must have been processed."""
        assert self.next_row == self._rows(self.number).stop, (self.number, self.next_row)
        if not self._record.is_file():
            self.commit()
            for name, array in self._arrays.items():
                self._files[name].seek(0)
                _write_all(self._files[name], np.frombuffer(self._header(array), dtype=np.uint8))
            self._sync()
            record = {
                "rows": self._num_pairs,
                "captions": self._num_captions,
                "truncated_captions": self._num_truncated,
                "problems": [asdict(problem) for problem in self._problems],
                "files": file_records(self.partial / name for name in self._files),
            }
            write_json(self._record, record, indent=1)
        for name in read_record(self._record)["files"]:
            if (self.partial / name).exists():  # a run that was killed may have moved it already
                (self.partial / name).replace(self.folder / name)
        sync_path(self.folder)
        self._record.replace(self.folder / self._record.name)
        sync_path(self.folder)
        self._files.clear()
        shutil.rmtree(self.partial, ignore_errors=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._open:
            if not isinstance(error, OSError):  # on a full disk a commit would fail again
                self.commit()

    def _lock(self) -> io.FileIO:
        busy = UserError(
            f"--output_dir {self.folder}: another process is writing shard {self.number}; give each process its own"
            " shards, such as --shard 0/2 and --shard 1/2"
        )
        while True:
            self.partial.mkdir(exist_ok=True)
            try:
                file = (self.partial / "lock").open("a+b", buffering=0)
            except FileNotFoundError:  # the process that finished this shard has just removed the folder
                continue
            with contextlib.ExitStack() as opened:
                opened.enter_context(file)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise busy from None
                if (self.folder / self._record.name).exists():
                    shutil.rmtree(self.partial, ignore_errors=True)
                    raise busy
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), (self.partial / "lock").stat()):
                        opened.pop_all()
                        return file

    def _load_progress(self) -> None:
        if not (self.partial / "progress.json").is_file():
            return
        progress = read_record(self.partial / "progress.json")
        self.next_row = self._committed = progress["next_row"]
        self._num_pairs, self._num_captions = progress["rows"], progress["captions"]
        self._num_truncated = progress.get("truncated_captions")
        self._caption_bytes = progress["bytes"][self._captions_file]
        self._problems = [Problem(**problem) for problem in progress["problems"]]
        assert self._sizes() == progress["bytes"], "this shard was started with other settings"

    def _sizes(self) -> dict[str, int]:
        """Size of each file in bytes."""
        return {
            **{
                name: len(self._header(array)) + self._length(array) * array.dtype.itemsize * int(np.prod(array.shape))
                for name, array in self._arrays.items()
            },
            self._captions_file: self._caption_bytes,
        }

    def _length(self, array: ArrayInfo) -> int:
        return self._num_captions if array.per_caption else self._num_pairs

    def _header(self, array: ArrayInfo) -> bytes:
        """The `.npy` header. NumPy pads it so that the first axis can grow and the size stays the same."""
        header = io.BytesIO()
        shape = (self._length(array), *array.shape)
        descr = np.lib.format.dtype_to_descr(array.dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        return header.getvalue()

    def _sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())


def record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def committed_row(folder: Path, number: int, rows: range) -> int | None:
    """The first source row that an unfinished shard has not processed. None: the shard must be started again."""
    partial = folder / f".partial-{number:05d}"
    record, progress = partial / record_name(number), partial / "progress.json"
    try:
        if record.is_file():
            for name, described in read_record(record)["files"].items():
                path = partial / name if (partial / name).exists() else folder / name
                if path.stat().st_size != described["bytes"]:
                    return None
            return rows.stop
        content = read_record(progress)
        if any((partial / name).stat().st_size < size for name, size in content["bytes"].items()):
            return None
        next_row = content["next_row"]
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return None
    return next_row if isinstance(next_row, int) and rows.start <= next_row <= rows.stop else None


# Files


def read_record(path: Path) -> Any:
    """A JSON file of an unfinished store. Raises UserError if it is damaged."""
    try:
        return read_json(path)
    except ValueError:
        raise UserError(
            f"--output_dir {path.parent}: {path.name} is damaged; remove it and run the same command again"
        ) from None


def file_records(files: Iterable[Path], folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """{name, or path within `folder` if given: {"bytes", "sha256"}}."""
    described: dict[str, dict[str, Any]] = {}
    for path in files:
        name = path.relative_to(folder).as_posix() if folder else path.name
        described[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return described


def _sum(a: int | None, b: int | None) -> int | None:
    """None: not known."""
    return None if a is None or b is None else a + b


def _write_all(file: io.FileIO, data: np.ndarray) -> None:
    """Write (n,) uint8 without a buffer, so that closing the file cannot fail."""
    view = data.data
    while view:
        view = view[file.write(view) :]
