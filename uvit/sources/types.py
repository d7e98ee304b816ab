"""What crosses the arrows of the data flow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from uvit.errors import UserError


@dataclass(frozen=True)
class Problem:
    """Something of a source that cannot be used as it is."""

    id: str  # of the pair
    kind: str  # such as "broken image": problems are counted by it
    message: str  # one sentence that names the file
    left_out: bool = True  # the whole pair; False: only a part of it, such as one of its captions


class PairError(UserError):
    """A pair that cannot be used: left out or fatal, as the person chose."""

    def __init__(self, problem: Problem):
        super().__init__(problem.message)
        self.problem = problem

    def __reduce__(self) -> tuple[type["PairError"], tuple[Problem]]:
        return PairError, (self.problem,)


@dataclass(frozen=True)
class Pair:
    """An image, RGB, of any size, and its captions, one or more."""

    id: str
    image: Image.Image
    captions: tuple[str, ...]
    problems: tuple[Problem, ...] = ()  # what is wrong with it and did not keep it from being used


class Source(Protocol):
    """Pairs in a fixed order, any of which can be had at once. Picklable, and holds no open files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Raises PairError where this pair cannot be used."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """A pair's captions without its image. Raises PairError."""
        ...

    def problems(self) -> list[Problem]:
        """What the index alone shows, before any image is read; indexing raises or repeats it."""
        ...


class Stream(Protocol):
    """Pairs in a fixed order that come one after the other, their number not known beforehand. Picklable."""

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        """(position, pair) from `start` on; positions that are not `wanted` come as None, without decoding."""
        ...

    def all_captions(self) -> Iterator[str]:
        """Of all pairs that have any, in order, without decoding images."""
        ...
