"""Sources made of others: one after the other, and each so-manieth pair."""

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from uvit.sources.types import Pair, PairError, Problem, Source, Stream


class ConcatSource:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]):
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

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class SplitRule:
    """The rows of one part: row r of the whole is in `val` where r % every == every - 1, else in `train`."""

    every: int
    split: str

    def row(self, position: int) -> int:
        """Where in the whole a position of this part is."""
        if self.split == "val":
            return position * self.every + self.every - 1
        return position + position // (self.every - 1)

    def position(self, row: int) -> int | None:
        """Where in this part a row of the whole is; None: in the other part."""
        if (row % self.every == self.every - 1) != (self.split == "val"):
            return None
        return row // self.every if self.split == "val" else row - row // self.every

    def count(self, num_rows: int) -> int:
        num_val = num_rows // self.every
        return num_val if self.split == "val" else num_rows - num_val


@dataclass(frozen=True)
class SplitSource:
    """One part of a source."""

    source: Source
    rows: SplitRule

    def __len__(self) -> int:
        return self.rows.count(len(self.source))

    def __getitem__(self, index: int) -> Pair:
        return self.source[self.rows.row(index)]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.rows.row(index))

    def problems(self) -> list[Problem]:
        """What leaves out pairs of this part. The source's own list does not say which rows it speaks of."""
        if not self.source.problems():
            return []
        found = []
        for index in range(len(self)):
            try:
                self.captions(index)
            except PairError as error:
                found.append(error.problem)
        return found


@dataclass(frozen=True)
class StreamView:
    """A source read as a stream, to stand among streams."""

    source: Source

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        for row in range(start, len(self.source)):
            pair: Pair | PairError | None = None
            if wanted(row):
                try:
                    pair = self.source[row]
                except PairError as error:
                    pair = error
            yield row, pair

    def all_captions(self) -> Iterator[str]:
        for row in range(len(self.source)):
            try:
                yield from self.source.captions(row)
            except PairError:
                continue


@dataclass(frozen=True)
class ConcatStream:
    """Several streams, one after the other."""

    streams: list[Stream]

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        first = 0
        for stream in self.streams:
            # Only who reads a stream from its beginning learns how long it is.
            begin = max(start - first, 0) if stream is self.streams[-1] else 0
            length = 0
            for row, pair in stream.read(begin, lambda row, first=first: first + row >= start and wanted(first + row)):  # type: ignore[misc]
                length = row + 1
                if first + row >= start:
                    yield first + row, pair
            first += length

    def all_captions(self) -> Iterator[str]:
        for stream in self.streams:
            yield from stream.all_captions()


@dataclass(frozen=True)
class SplitStream:
    """One part of a stream; its captions are those of all parts, as they come without their place."""

    stream: Stream
    rows: SplitRule

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        def row_wanted(row: int) -> bool:
            position = self.rows.position(row)
            return position is not None and wanted(position)

        for row, pair in self.stream.read(self.rows.row(start), row_wanted):
            position = self.rows.position(row)
            if position is not None:
                yield position, pair

    def all_captions(self) -> Iterator[str]:
        return self.stream.all_captions()
