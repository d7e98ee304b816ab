"""Read items of arrays that are stored in many `.npy` files, with positioned reads (`preadv`).

Memory maps would be slower. Each first access to a page costs a fault in addition to the copy, and in a large store
most accesses are first ones. Each map keeps a file descriptor, and mapped pages count as the process's memory. On a
cold disk, a fault waits for one page before the next is requested. Here, the disk gets the requests for a whole batch
before the first wait.

Two refinements were measured and dropped, as neither gained enough: memory that batches use again, and asking first
whether an item is in the system's cache (`RWF_NOWAIT`). Announcing all reads (`posix_fadvise`) doubles the speed on a
cold disk. docs/benchmarks.md has the figures.
"""

import functools
import io
import math
import os
import resource
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

HEADER_BYTES = 4096  # the header of an .npy file usually takes 128 of them


class OpenFile:
    """A file descriptor that closes with its last reference.

    A reader keeps a reference while it reads: another thread may open files meanwhile, and so push this one out of the
    cache.
    """

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit, `os` may be None
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class OpenFiles:
    """The files of a folder, by name. The most recently used stay open: a quarter of the process's limit."""

    def __init__(self, folder: Path):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        num_open = 4096 if limit == resource.RLIM_INFINITY else max(1, min(4096, limit // 4))
        self.open = functools.lru_cache(num_open)(lambda name: OpenFile(f"{folder}/{name}"))


class ReadRequest(NamedTuple):
    """The place of an item in a file, and the memory that it is read into."""

    name: str
    offset: int
    out: memoryview


class ShardedArray:
    """Arrays of shape (n_i, *shape), one in each file, read as one array of (sum of n_i, *shape).

    Args:
        names, lengths, offsets: for each file, its name, its n_i and the byte where its data start.
    """

    def __init__(
        self, names: list[str], lengths: list[int], offsets: list[int], shape: tuple[int, ...], dtype: np.dtype
    ):
        self.names, self.lengths, self.offsets, self.shape, self.dtype = names, lengths, offsets, shape, dtype
        self._first = np.cumsum([0, *lengths[:-1]])  # (files,): index of each file's first item
        self._item_bytes = math.prod(shape) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all items together."""
        return sum(self.lengths) * self._item_bytes

    def empty(self, num_items: int) -> np.ndarray:
        return np.empty((num_items, *self.shape), self.dtype)

    def find(self, item: int) -> tuple[int, int]:
        """-> (index of the file, index of the item within the file)."""
        # An empty file starts at the same item as the next file. side="right" picks the last of them.
        file = int(np.searchsorted(self._first, item, side="right")) - 1
        return file, item - int(self._first[file])

    def requests(self, items: np.ndarray, out: np.ndarray) -> list[ReadRequest]:
        """What to read for `items`, (B,), into `out`, (B, *shape)."""
        files = np.searchsorted(self._first, items, side="right") - 1
        starts = ((items - self._first[files]) * self._item_bytes).tolist()
        names, offsets, size, data = self.names, self.offsets, self._item_bytes, as_bytes(out)
        return [
            ReadRequest(names[file], offsets[file] + start, data[i * size : (i + 1) * size])
            for i, (file, start) in enumerate(zip(files.tolist(), starts, strict=True))
        ]


def as_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def read_all(files: OpenFiles, requests: list[ReadRequest]) -> None:
    """Announce all reads to the disk, then wait for one after the other.

    Raises OSError, or EOFError if a file has become shorter.
    """
    if hasattr(os, "posix_fadvise"):
        for name, offset, out in requests:
            file = files.open(name)
            os.posix_fadvise(file.descriptor, offset, len(out), os.POSIX_FADV_WILLNEED)
    for name, offset, out in requests:
        file, done = files.open(name), 0
        while done < len(out):
            num_bytes = os.preadv(file.descriptor, [out[done:]], offset + done)
            if not num_bytes:
                raise EOFError(f"{name} is shorter than when it was opened")
            done += num_bytes


# Headers


@dataclass(frozen=True)
class Header:
    """The header of an `.npy` file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # byte where the data start


def read_header(files: OpenFiles, name: str) -> Header:
    """Raises OSError or ValueError if the file has no valid header."""
    file = files.open(name)
    return _parse(os.pread(file.descriptor, HEADER_BYTES, 0))


def _parse(data: bytes) -> Header:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(file)
    except (SyntaxError, tokenize.TokenError, SystemError) as error:  # Python 3.11 raises SystemError for odd nesting
        raise ValueError(f"bad header: {error}") from None
    return Header(shape, dtype, fortran_order, file.tell())
