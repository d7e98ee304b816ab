"""The numbers that a flag accepts, declared with its field: `max_steps: PositiveInt = 1000`."""

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from uvit.errors import UserError

T = TypeVar("T")
LARGEST = 2**63 - 1  # what a 64-bit integer holds


@dataclass(frozen=True)
class Bounds:
    """A range of numbers; `Bounds()` is every number. NaN and the infinities are outside every range."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    extra: float | None = None  # a value outside the range that has a meaning of its own
    hint: str = ""  # ends the error message, for example with what `extra` means

    def problem(self, number: int | float) -> str:
        """What is wrong with a number, or an empty string."""
        if isinstance(number, float) and not math.isfinite(number):
            return "must be a finite number"
        if number == self.extra or self._holds(number):
            return "" if abs(number) <= LARGEST or isinstance(number, float) else "must be below 2^63"
        return f"must {self._words()}" + (f"; {self.hint}" if self.hint else "")

    def _holds(self, number: int | float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def _words(self) -> str:
        if self.least is not None and self.most is not None:
            return f"be in {_written(self.least)}..{_written(self.most)}"
        if self == Bounds(least=0, extra=self.extra, hint=self.hint):
            return "not be negative"
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return "be " + " and ".join(f"{words} {_written(end)}" for words, end in ends.items() if end is not None)


def _written(end: float) -> str:
    return "2^63-1" if end == LARGEST else f"{end:,}" if isinstance(end, int) else f"{end:g}"


PositiveInt = Annotated[int, Bounds(least=1)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, below=1)]
AnyInt = Annotated[int, Bounds()]
RealNumber = Annotated[float, Bounds()]
Seed = Annotated[int, Bounds(least=0, most=LARGEST)]
# What is held in memory, or started, at once: above these ends a number is a slip of the keyboard.
BatchSize = Annotated[int, Bounds(least=1, most=1_000_000)]
ImageSide = Annotated[int, Bounds(least=1, most=65_536)]
NumTokens = Annotated[int, Bounds(least=3, most=1_000_000, hint="the start token and the end token count")]
NumWorkers = Annotated[int, Bounds(least=0, most=1024)]
VocabSize = Annotated[int, Bounds(least=256 + 3, most=10_000_000, hint="one for each byte and 3 special tokens")]


def check_bounds(config: Any) -> None:
    """Raises UserError for the first number of a config that its field does not accept."""
    for name, bounds in marks(type(config), Bounds).items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (problem := bounds.problem(number)):
                raise UserError(f"--{name} {number}: {problem}")


def marks(cls: type, kind: type[T]) -> dict[str, T]:
    """{field: its mark} of a config's fields with a mark of a kind in their type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := _find(hint, kind)) is not None}


def _find(hint: Any, kind: type[T]) -> T | None:
    """The mark in `Annotated[int, Bounds(...)]`, also within `... | None` and `tuple[..., ...]`."""
    own = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, kind)]
    within = [found for item in typing.get_args(hint) if (found := _find(item, kind)) is not None]
    return next(iter([*own, *within]), None)
