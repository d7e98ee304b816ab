"""Items of arrays that lie in many .npy files, read with positioned reads.

Why no memory maps: the first visit of a page costs a fault beside the copy, and in a large store most visits are
first ones; each map holds a file descriptor; what is mapped counts as the process's memory; and on a cold disk a fault
waits for one page before the next is asked for. Here the disk is asked for a whole batch before the first wait.
"""

import functools
import io
import math
import os
import resource
import sys
import threading
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux: read what is in memory, and nothing else
HEADER_BYTES = 4096  # of which an .npy's header takes 128 as a rule


class OpenFile:
    """A file descriptor that closes when nobody holds it any more: who reads must, as another thread may open files."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit, `os` may be gone
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class OpenFiles:
    """Files by their names in a folder. Those used last stay open: a quarter of what the process may have."""

    def __init__(self, folder: Path):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        num_open = 4096 if limit == resource.RLIM_INFINITY else max(1, min(4096, limit // 4))
        self.open = functools.lru_cache(num_open)(lambda name: OpenFile(f"{folder}/{name}"))


class BufferPool:
    """Arrays whose memory is used again when nobody has it any more: fresh pages cost as much as reading into them."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            for i in range(len(self._blocks)):
                # The list has it, and this function's own name for it; any view or tensor would count as well.
                if len(block := self._blocks[i]) == num_bytes and sys.getrefcount(block) == 3:
                    break
            else:
                block = np.empty(num_bytes, np.uint8)
                self._blocks.append(block)
            return block.view(dtype).reshape(shape)


class ReadRequest(NamedTuple):
    """Where an item is, and the bytes that it goes to."""

    name: str
    offset: int
    out: memoryview


class ShardedArray:
    """Arrays of (n_i, *shape) in files that follow one another.

    Args:
        names, lengths, offsets: of each file: its name, its n_i, and the byte at which its data begin.
    """

    def __init__(
        self, names: list[str], lengths: list[int], offsets: list[int], shape: tuple[int, ...], dtype: np.dtype
    ):
        self.names, self.offsets, self.shape, self.dtype = names, offsets, shape, dtype
        self._memory = BufferPool()
        self._first = np.cumsum([0, *lengths[:-1]])  # of each file, the number of its first item
        self._item_bytes = math.prod(shape) * dtype.itemsize

    def empty(self, num_items: int) -> np.ndarray:
        return self._memory.empty((num_items, *self.shape), self.dtype)

    def find(self, item: int) -> tuple[int, int]:
        """-> (number of the file, number of the item in it)."""
        # An empty file's first item is also the next file's, and side="right" takes the last of them.
        file = int(np.searchsorted(self._first, item, side="right")) - 1
        return file, item - int(self._first[file])

    def places(self, items: np.ndarray, out: np.ndarray) -> list[ReadRequest]:
        """Of `items`, (B,), which go to `out`, (B, *shape)."""
        files = np.searchsorted(self._first, items, side="right") - 1
        starts = ((items - self._first[files]) * self._item_bytes).tolist()
        names, offsets, size, data = self.names, self.offsets, self._item_bytes, as_bytes(out)
        return [
            ReadRequest(names[file], offsets[file] + start, data[i * size : (i + 1) * size])
            for i, (file, start) in enumerate(zip(files.tolist(), starts, strict=True))
        ]


def as_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def read_all(files: OpenFiles, places: list[ReadRequest]) -> None:
    """Take what is in memory; ask the disk for all the rest, and only then wait for it.

    Raises OSError, or EOFError where a file has become shorter.
    """
    absent = [place for place in places if not _read_if_cached(files, place)] if NOWAIT is not None else places
    if hasattr(os, "posix_fadvise"):
        for name, offset, out in absent:
            file = files.open(name)
            os.posix_fadvise(file.descriptor, offset, len(out), os.POSIX_FADV_WILLNEED)
    for name, offset, out in absent:
        file, done = files.open(name), 0
        while done < len(out):
            num_bytes = os.preadv(file.descriptor, [out[done:]], offset + done)
            if not num_bytes:
                raise EOFError(f"{name} has become shorter")
            done += num_bytes


def _read_if_cached(files: OpenFiles, place: ReadRequest) -> bool:
    """Read an item if all of it is in memory."""
    try:
        file = files.open(place.name)
        return os.preadv(file.descriptor, [place.out], place.offset, NOWAIT or 0) == len(place.out)
    except OSError:  # it is not, or the file system cannot tell; other errors come again where we wait
        return False


# Headers


@dataclass(frozen=True)
class Header:
    """Of an .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # at which the data begin


def read_header(files: OpenFiles, name: str) -> Header:
    """Raises OSError or ValueError where there is none."""
    file = files.open(name)
    return _parse(os.pread(file.descriptor, HEADER_BYTES, 0))


def _parse(data: bytes) -> Header:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(file)
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"its header is {error}") from None
    return Header(shape, dtype, fortran_order, file.tell())
