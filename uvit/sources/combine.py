"""Combine sources: several one after the other, or one split into `train` and `val`."""

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, Source, digest_of


class ConcatSource(RandomAccessSource):
    """Several sources with random access, one after the other."""

    def __init__(self, sources: list[RandomAccessSource]):
        self.sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Pair:
        source, row = self._find(index)
        return source[row]

    def captions(self, index: int) -> tuple[str, ...]:
        source, row = self._find(index)
        return source.captions(row)

    def problems(self) -> list[Problem]:
        return [problem for source in self.sources for problem in source.problems()]

    def image_files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(source.image_files() for source in self.sources)

    def index_sha256(self) -> str | None:
        found = [source.index_sha256() for source in self.sources]
        return digest_of((each or "").encode() for each in found) if any(found) else None

    def _find(self, index: int) -> tuple[RandomAccessSource, int]:
        number = bisect.bisect_right(self._ends, index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class SplitRule:
    """The rows of one split. Row r of the source is in `val` if r % every == every - 1, else in `train`."""

    every: int
    split: str

    def row(self, position: int) -> int:
        """The row of the source at a position of this split."""
        if self.split == "val":
            return position * self.every + self.every - 1
        return position + position // (self.every - 1)

    def position(self, row: int) -> int | None:
        """The position in this split of a row of the source. None: the row is in the other split."""
        if (row % self.every == self.every - 1) != (self.split == "val"):
            return None
        return row // self.every if self.split == "val" else row - row // self.every

    def count(self, num_rows: int) -> int:
        num_val = num_rows // self.every
        return num_val if self.split == "val" else num_rows - num_val


@dataclass(frozen=True)
class SplitSource(RandomAccessSource):
    """One split of a source with random access."""

    source: RandomAccessSource
    rows: SplitRule

    def __len__(self) -> int:
        return self.rows.count(len(self.source))

    def __getitem__(self, index: int) -> Pair:
        return self.source[self.rows.row(index)]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.rows.row(index))

    def problems(self) -> list[Problem]:
        """The problems because of which pairs of this split are skipped. The source's own list does not give rows."""
        if not self.source.problems():
            return []
        problems = []
        for index in range(len(self)):
            try:
                self.captions(index)
            except PairError as error:
                problems.append(error.problem)
        return problems

    def image_files(self) -> Iterator[Path]:
        return self.source.image_files()

    def index_sha256(self) -> str | None:
        return self.source.index_sha256()


@dataclass(frozen=True)
class ConcatStream(Source):
    """Several sources, one after the other. At least one has no random access."""

    sources: list[Source]

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        first = 0
        for source in self.sources:
            # A source must be read from its beginning to learn its length.
            begin = max(start - first, 0) if source is self.sources[-1] else 0
            length = 0
            for row, pair in source.read(begin, lambda row, first=first: first + row >= start and wanted(first + row)):  # type: ignore[misc]
                length = row + 1
                if first + row >= start:
                    yield first + row, pair
            first += length

    def all_captions(self) -> Iterator[str]:
        for source in self.sources:
            yield from source.all_captions()


@dataclass(frozen=True)
class SplitStream(Source):
    """One split of a source without random access. `all_captions` gives those of both splits: they have no rows."""

    source: Source
    rows: SplitRule

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        def row_wanted(row: int) -> bool:
            position = self.rows.position(row)
            return position is not None and wanted(position)

        for row, pair in self.source.read(self.rows.row(start), row_wanted):
            position = self.rows.position(row)
            if position is not None:
                yield position, pair

    def all_captions(self) -> Iterator[str]:
        return self.source.all_captions()
