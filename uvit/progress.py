"""The progress of long work: a bar on a terminal, plain lines in a file or a pipe.

Both go to stderr. Stdout holds the results of a command alone, so that a pipe gets nothing else, and `2> /dev/null`
turns progress off.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TextIO, TypeVar

from tqdm import tqdm

from uvit.io import format_bytes

LINE_SECONDS = 10.0  # the least time between two lines

T = TypeVar("T")


class Progress:
    """How much of some work is done. `close` ends it, and so does a `with` block.

    Args:
        name: of the work, at the start of the bar or line.
        total: the amount of work; None: unknown.
        unit: of amounts, in the singular; `byte` shows KiB, MiB, ...
        done: the amount that was done earlier, which says nothing about the speed.
        bar: show a bar, if stderr is a terminal.
        lines: without a bar, print a line every LINE_SECONDS, and one at the end.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        bar: bool = True,
        lines: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.total, self.unit, self.clock = name, total, unit, clock
        self.done = float(done)
        self.bar = _Bar(name, total, unit, done) if bar and is_terminal(sys.stderr) else None
        self.lines = lines and self.bar is None
        self.started = self.last_line = clock()
        self.updated = 0.0  # the amount of all updates
        self.first_update: tuple[float, float] | None = None  # when, and the amount: it includes the start-up

    def update(self, amount: float = 1) -> None:
        """More is done. Fractions are fine: only whole units are shown."""
        now = self.clock()
        self.done += amount
        self.updated += amount
        self.first_update = self.first_update or (now, amount)
        if self.bar is not None:
            self.bar.update(amount)
        elif (
            self.lines
            and now - self.last_line >= LINE_SECONDS
            and (self.total is None or _whole(self.done) < self.total)
        ):
            self.last_line = now
            self._print_line()

    def skip(self, amount: float = 1) -> None:
        """More was done earlier, which says nothing about the speed."""
        self.done += amount
        if self.bar is not None:
            self.bar.skip(amount)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items. Each is done when the next one is asked for."""
        for item in items:
            yield item
            self.update()

    def note(self, text: str) -> None:
        """Show something more at the end of the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def rate(self) -> float | None:
        """Units per second, without the first update if there are others; None: unknown."""
        seconds, amount = self.clock() - self.started, self.updated
        if self.first_update is not None and amount > self.first_update[1]:
            seconds, amount = self.clock() - self.first_update[0], amount - self.first_update[1]
        return amount / seconds if amount and seconds > 0 else None

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.lines and self.updated:
            self._print_line(end=True)
        self.lines = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_line(self, end: bool = False) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()  # what was printed earlier stands earlier in a file of both streams
        print(self.line(end), file=sys.stderr, flush=True)

    def line(self, end: bool = False) -> str:
        """Such as `extract: 12,800/41,000 pairs (31%), 212 pairs/s, 0:02:13 left`."""
        text, rate = f"{self.name}: {self._amounts()}", self.rate()
        if rate is not None:
            text += f", {format_bytes(rate)}/s" if self.unit == "byte" else f", {_three_digits(rate)} {self.unit}s/s"
        if end:
            return f"{text}, took {duration(self.clock() - self.started)}"
        if self.total is None or rate is None:
            return f"{text}, {duration(self.clock() - self.started)} so far"
        return f"{text}, {duration((self.total - self.done) / rate)} left"

    def _amounts(self) -> str:
        done = _whole(self.done)
        share = f" ({done / self.total:.0%})" if self.total else ""
        if self.unit == "byte":
            return format_bytes(done) + ("" if self.total is None else f" of {format_bytes(self.total)}") + share
        return f"{done:,}" + ("" if self.total is None else f"/{self.total:,}") + f" {self.unit}s{share}"


def write(sentence: str, file: TextIO | None = None) -> None:
    """Print a line, to stdout or another stream, without tearing a bar."""
    with tqdm.external_write_mode(file=file):
        print(sentence, file=file, flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def duration(seconds: float) -> str:
    """H:MM:SS."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class _Bar(tqdm):
    """tqdm's bar, on stderr, with amounts in whole units."""

    def __init__(self, name: str, total: int | None, unit: str, done: int):
        style: dict[str, Any] = {"unit": unit}
        if unit == "byte":
            style = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
        elif total is not None:
            style["bar_format"] = "{l_bar}{bar}| {whole}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        super().__init__(desc=name, total=total, initial=done, smoothing=0.05, **style)

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "whole": _whole(self.n)}

    def skip(self, amount: float) -> None:
        self.n += amount
        self.initial += amount
        self.last_print_n += amount
        self.refresh()


def _whole(amount: float) -> int:
    return int(amount + 1e-6)  # fractions that add up to a unit may miss it by their rounding


def _three_digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
