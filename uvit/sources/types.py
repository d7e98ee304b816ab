"""Pairs of images and captions, problems with them, and the interface of all sources of pairs."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from uvit.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A part of a source that cannot be used."""

    id: str  # of the pair
    kind: str  # such as "broken image"; problems are counted by kind
    message: str  # one sentence that names the file
    left_out: bool = True  # the whole pair is skipped; False: only a part of it, such as one caption


class PairError(UserError):
    """A pair that cannot be used. The caller skips it, or stops."""

    def __init__(self, problem: Problem):
        super().__init__(problem.message)
        self.problem = problem

    def __reduce__(self) -> tuple[type["PairError"], tuple[Problem]]:
        return PairError, (self.problem,)


@dataclass(frozen=True)
class Pair:
    """An upright image of any size, of the modes of `uvit.images.to_channels`, and one or more captions."""

    id: str
    image: Image.Image
    captions: tuple[str, ...]
    problems: tuple[Problem, ...] = ()  # problems despite which it is usable


def digest_of(parts: Iterable[bytes]) -> str:
    """The SHA-256 of parts, whose boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()


class Source(ABC):
    """Pairs in a fixed order, read one after the other. Their number may be unknown. Picklable: holds no open files."""

    @abstractmethod
    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        """Yield (position, pair) from `start` on. A position that is not `wanted` has None: nothing is decoded."""

    @abstractmethod
    def all_captions(self) -> Iterator[str]:
        """The captions of all usable pairs, in order, without decoding images."""

    def index_sha256(self) -> str | None:
        """Tells a changed index from the one before: other names, places or sizes. None: there is no index."""
        return None


class RandomAccessSource(Source):
    """A source of known length, any pair of which can be read at once."""

    @abstractmethod
    def __len__(self) -> int: ...

    def image_files(self) -> Iterator[Path]:
        """The files on this disk that hold the images. None of images that are made, or on the Hub."""
        return iter(())

    @abstractmethod
    def __getitem__(self, index: int) -> Pair:
        """Raises PairError if this pair is unusable."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a pair, without its image. Raises PairError."""

    @abstractmethod
    def problems(self) -> list[Problem]:
        """The problems that the index shows, before any image is read. Indexing raises or repeats them."""

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        for row in range(start, len(self)):
            pair: Pair | PairError | None = None
            if wanted(row):
                try:
                    pair = self[row]
                except PairError as error:
                    pair = error
            yield row, pair

    def all_captions(self) -> Iterator[str]:
        for row in range(len(self)):
            try:
                yield from self.captions(row)
            except PairError:
                continue
