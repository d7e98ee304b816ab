"""The flags of a command, from its config dataclass: each field is a flag, and its type says what values it takes."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uvit.errors import UserError

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Flag:
    name: str
    kind: Any  # of one value: str, int, float, bool or a Literal
    count: int | None = 1  # number of values; None: any
    optional: bool = False  # whether None is a value
    required: bool = False
    default: Any = None

    def read(self, items: Sequence[str]) -> Any:
        """The strings of a command line or a file -> the field's value. Raises UserError if they do not fit."""
        if self.optional and list(items) == ["None"]:
            return None
        try:
            if self.count not in (None, len(items)):
                raise ValueError
            values = tuple(_read(self.kind, item) for item in items)
        except ValueError:
            raise UserError(f"--{self.name} {' '.join(items)}: must be {self._wanted()}") from None
        return values[0] if self.count == 1 else values

    def _wanted(self) -> str:
        words = {bool: "True or False", int: "a whole number", float: "a number"}
        one = words.get(self.kind) or (f"one of {', '.join(self.choices)}" if self.choices else "text")
        return one if self.count in (None, 1) else f"{self.count} values, each {one}"

    @property
    def choices(self) -> list[str]:
        """Those of a Literal."""
        return [str(choice) for choice in typing.get_args(self.kind)]


def _read(kind: Any, text: str) -> Any:
    """Raises ValueError if a text is not of a kind."""
    if kind in (str, int, float):
        return kind(text)
    words = BOOLEANS if kind is bool else {str(choice): choice for choice in typing.get_args(kind)}
    if (word := text.lower() if kind is bool else text) not in words:
        raise ValueError
    return words[word]


def flags_of(cls: type) -> dict[str, Flag]:
    """{name: flag} of a config dataclass, in its order."""
    hints = typing.get_type_hints(cls)
    flags = {}
    for field in dataclasses.fields(cls):
        kind, optional = hints[field.name], False
        count: int | None = 1
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
            kind, optional = next(item for item in typing.get_args(kind) if item is not type(None)), True
        if typing.get_origin(kind) is tuple:
            kind, *others = typing.get_args(kind)
            count = None if others == [...] else 1 + len(others)
        required = field.default is dataclasses.MISSING
        flags[field.name] = Flag(field.name, kind, count, optional, required, None if required else field.default)
    return flags
