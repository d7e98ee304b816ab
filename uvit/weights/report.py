"""The report of a conversion: every value that is filled in or dropped has a line."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Four kinds of lines, in the order in which the conversion adds them."""

    read: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    defaulted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [f"{kind}: {line}" for kind, lines in vars(self).items() for line in lines]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def shorten(names: list[str], limit: int = 3) -> str:
    """a, b, c and 7 more"""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
