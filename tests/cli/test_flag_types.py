"""A field's type says what its flag takes."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from uvit.cli.parse import Flag, flags_of
from uvit.config.bounds import PositiveInt
from uvit.errors import UserError


@dataclass(frozen=True)
class Config:
    name: str
    paths: tuple[str, ...]
    size: PositiveInt = 4
    limit: PositiveInt | None = None
    kind: Literal["round", "square"] | None = None
    span: tuple[Annotated[float, "a bound"], float] = (0, 1)
    quick: bool = True


def test_fields_as_flags() -> None:
    assert list(flags_of(Config).values()) == [
        Flag("name", str, required=True),
        Flag("paths", str, count=None, required=True),
        Flag("size", int, default=4),
        Flag("limit", int, optional=True),
        Flag("kind", Literal["round", "square"], optional=True),
        Flag("span", float, count=2, default=(0, 1)),
        Flag("quick", bool, default=True),
    ]


@pytest.mark.parametrize(
    ("name", "items", "value"),
    [
        ("name", ["None"], "None"),
        ("paths", ["a", "b"], ("a", "b")),
        ("paths", [], ()),
        ("size", ["7"], 7),
        ("limit", ["None"], None),
        ("kind", ["square"], "square"),
        ("kind", ["None"], None),
        ("span", ["-1", "1e3"], (-1.0, 1000.0)),
        ("quick", ["NO"], False),
    ],
)
def test_values(name: str, items: list[str], value: Any) -> None:
    found = flags_of(Config)[name].read(items)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "items", "sentence"),
    [
        ("size", ["None"], "--size None: must be a whole number"),
        ("size", ["1e3"], "--size 1e3: must be a whole number"),
        ("size", ["9" * 5000], f"--size {'9' * 5000}: must be a whole number"),
        ("kind", ["oval"], "--kind oval: must be one of round, square"),
        ("span", ["1", "x"], "--span 1 x: must be 2 values, each a number"),
        ("quick", [""], "--quick : must be True or False"),
        ("name", ["a", "b"], "--name a b: must be text"),
    ],
)
def test_values_that_do_not_fit(name: str, items: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        flags_of(Config)[name].read(items)
    assert str(error.value) == sentence
