"""The numbers that a flag accepts, declared with its field: `max_steps: PositiveInt = 1000`."""

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from uvit.errors import UserError

LARGEST = 2**63 - 1  # what a 64-bit integer holds


@dataclass(frozen=True)
class Bounds:
    """A range of numbers. NaN and the infinities are outside every range."""

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
            return f"be in {self.least:g}..{'2^63-1' if self.most == LARGEST else format(self.most, 'g')}"
        if self == Bounds(least=0, extra=self.extra, hint=self.hint):
            return "not be negative"
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return "be " + " and ".join(f"{words} {end:g}" for words, end in ends.items() if end is not None)


PositiveInt = Annotated[int, Bounds(least=1)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, below=1)]
Seed = Annotated[int, Bounds(least=0, most=LARGEST)]


def check_bounds(config: Any) -> None:
    """Raises UserError for the first number of a config that its field does not accept."""
    for name, bounds in _bounds(type(config)).items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and (problem := bounds.problem(number)):
                raise UserError(f"--{name} {number}: {problem}")


def _bounds(cls: type) -> dict[str, Bounds]:
    """{field: its bounds}; without any of its own, those that every number has."""
    return {name: _find(hint) or Bounds() for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _find(hint: Any) -> Bounds | None:
    """The bounds in `Annotated[int, Bounds(...)]`, also within `... | None` and `tuple[..., ...]`."""
    own = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Bounds)]
    within = [found for item in typing.get_args(hint) if (found := _find(item))]
    return next(iter([*own, *within]), None)
