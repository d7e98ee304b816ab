"""What a conversion did, in words: nothing is filled in or left out in silence."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Lines under four heads; a conversion adds to them as it goes."""

    read: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    defaulted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        heads = {"read": self.read, "converted": self.converted, "defaulted": self.defaulted, "left": self.left}
        return [f"{head}: {line}" for head, lines in heads.items() for line in lines]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def shorten(names: list[str], limit: int = 3) -> str:
    """a, b, c and 7 more"""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
