"""The places of rows in large files: an index keeps a few bytes for each row, and reads the row again when needed."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from uvit.errors import UserError

Place = tuple[int, int]  # (start, number of bytes) of a row in its file; of a table: (number of the row, 0)


@dataclass(frozen=True, eq=False)
class Places:
    """The rows of each pair. N pairs have P rows together."""

    firsts: np.ndarray  # (N + 1,): pair i has the rows from firsts[i] to firsts[i + 1]
    starts: np.ndarray  # (P,)
    lengths: np.ndarray  # (P,)

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, pair: int) -> list[Place]:
        rows = slice(self.firsts[pair], self.firsts[pair + 1])
        return list(zip(self.starts[rows].tolist(), self.lengths[rows].tolist(), strict=True))


class PairReader(Protocol):
    """Reads pairs of an index again. Picklable: holds no open files."""

    def read(self, places: list[Place]) -> tuple[str, str, list[str]]:
        """The (id, path of the image, captions as they are in the file) of the pair with these rows."""


class PlaceList:
    """Places of rows, and a key for each, which is equal for equal texts: 96 bits of their hash."""

    def __init__(self) -> None:
        self.starts, self.lengths = array("q"), array("I")
        self._keys, self._more_keys = array("q"), array("I")

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, text: str, start: int = 0, length: int = 0) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.add_key(text)

    def add_key(self, text: str) -> None:
        self._keys.append(hash(text))
        self._more_keys.append(hash(text + "\0") & 0xFFFFFFFF)

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        return np.frombuffer(self._keys, np.int64), np.frombuffer(self._more_keys, np.uint32)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths)"""
        return np.frombuffer(self.starts, np.int64), np.frombuffer(self.lengths, np.uint32)


def number_equal(keys: np.ndarray, more_keys: np.ndarray) -> np.ndarray:
    """For each row, the number of its key, from 0, in the order in which the keys first appear."""
    order = np.lexsort((more_keys, keys))  # stable: of equal rows, the first one comes first
    is_new = np.zeros(len(order), bool)
    is_new[:1] = True
    for part in (keys, more_keys):
        sorted_part = part[order]
        is_new[1:] |= sorted_part[1:] != sorted_part[:-1]
        del sorted_part
    firsts = order[is_new]
    small = np.int32 if len(order) < 2**31 else np.int64
    ranks = np.empty(len(firsts), small)
    ranks[np.argsort(firsts)] = np.arange(len(firsts), dtype=small)
    numbers = np.empty(len(order), small)
    numbers[order] = ranks[np.cumsum(is_new, dtype=small) - 1]
    return numbers


def first_of_each(numbers: np.ndarray) -> np.ndarray:
    """Which rows have a number of `number_equal` that no earlier row has."""
    highest = np.maximum.accumulate(numbers)
    return np.concatenate([np.ones(min(1, len(numbers)), bool), highest[1:] > highest[:-1]])


@dataclass(frozen=True)
class IndexedFile:
    """A file whose rows are read by their places."""

    path: Path
    codec: str  # of a row, without a byte order mark
    errors: str  # how bytes are decoded that are not of this codec
    size: int
    modified: int

    def read(self, places: Sequence[Place]) -> Iterator[str]:
        """Raises UserError if the file is no longer the one of the index."""
        try:
            with self.path.open("rb", buffering=0) as file:
                check_state(self.path, (self.size, self.modified))
                for start, length in places:
                    file.seek(start)
                    yield file.read(length).decode(self.codec, self.errors)
        except OSError as error:
            raise UserError(f"{self.path}: can no longer be read ({error.strerror})") from None


def state_of(path: Path) -> tuple[int, int]:
    """(size, time of the last change), which tell whether a file is still the same."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_state(path: Path, state: tuple[int, int]) -> None:
    """Raises UserError if the file has changed since its rows were indexed."""
    if state_of(path) != state:
        raise UserError(f"{path}: has changed since it was opened; run the same command again")


def codec_of(encoding: str, head: bytes) -> tuple[str, int]:
    """-> (the encoding without a byte order mark, the number of bytes of the mark). `head` begins the file."""
    if encoding == "utf-8-sig":
        return "utf-8", 3 if head.startswith(b"\xef\xbb\xbf") else 0
    if encoding in ("utf-16", "utf-32"):
        order = "le" if head.startswith(b"\xff\xfe") else "be"
        return f"{encoding}-{order}", 2 if encoding == "utf-16" else 4
    return encoding, 0


def num_bytes(text: str, codec: str, errors: str) -> int:
    return len(text) if codec == "utf-8" and text.isascii() else len(text.encode(codec, errors))
