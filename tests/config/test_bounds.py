"""Numbers are checked where their fields are declared, in every config alike."""

import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from tests.flags import arguments, read
from uvit.cli.main import COMMANDS, _load, main
from uvit.cli.parse import flags_of
from uvit.config.bounds import (
    LARGEST,
    Bounds,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_bounds,
    marks,
)
from uvit.config.train import UNSUPPORTED
from uvit.errors import UserError


@dataclass(frozen=True)
class Config:
    count: PositiveInt = 1
    warmup: NonNegativeInt = 0
    gamma: PositiveFloat | None = None
    decay: Fraction = 0.5
    seed: Seed = 0
    limit: Annotated[int, Bounds(least=1, extra=-1, hint="-1 means never")] | None = None
    strength: Annotated[float, Bounds(above=0, most=1)] = 1
    many: tuple[Annotated[float, Bounds(least=0)], ...] = ()
    free: Annotated[float, Bounds()] = 0.0
    loud: bool = False
    name: str = "x"

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"count": 0}, "--count 0: must be at least 1"),
        ({"count": 2**63}, f"--count {2**63}: must be below 2^63"),
        ({"count": 10**400}, f"--count {10**400}: must be below 2^63"),
        ({"warmup": -1}, "--warmup -1: must not be negative"),
        ({"gamma": 0.0}, "--gamma 0.0: must be above 0"),
        ({"gamma": math.nan}, "--gamma nan: must be a finite number"),
        ({"gamma": math.inf}, "--gamma inf: must be a finite number"),
        ({"decay": 1.0}, "--decay 1.0: must be at least 0 and below 1"),
        ({"seed": -1}, "--seed -1: must be in 0..2^63-1"),
        ({"seed": 2**63}, f"--seed {2**63}: must be in 0..2^63-1"),
        ({"limit": 0}, "--limit 0: must be at least 1; -1 means never"),
        ({"strength": 1.5}, "--strength 1.5: must be above 0 and at most 1"),
        ({"many": (1.0, -2.0)}, "--many -2.0: must not be negative"),
        ({"free": -math.inf}, "--free -inf: must be a finite number"),
    ],
)
def test_a_number_out_of_bounds_is_named(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Config(**flags)
    assert str(error.value) == sentence


def test_what_is_within() -> None:
    Config(count=LARGEST, seed=LARGEST, limit=-1, gamma=1e-300, many=(0.0, 5.0), free=-1e300, loud=True)
    Config(limit=None, decay=0.0, strength=1.0)


# Every number of every command


def numbers(hint: Any) -> set[type]:
    """int or float, where the values of a type are numbers."""
    return {kind for kind in (hint, *typing.get_args(hint)) if kind in (int, float)}


def number_flags() -> list[tuple[str, str]]:
    hints = {name: typing.get_type_hints(_load(command.config)) for name, command in COMMANDS.items()}
    return [(command, name) for command, each in hints.items() for name, hint in each.items() if numbers(hint)]


def bounds_of(command: str, name: str) -> Bounds:
    return marks(_load(COMMANDS[command].config), Bounds)[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_declares_its_bounds(command: str) -> None:
    cls = _load(COMMANDS[command].config)
    names = {name for name, hint in typing.get_type_hints(cls).items() if numbers(hint)}
    assert names == set(marks(cls, Bounds)), "declare them in the type: PositiveInt, or AnyInt if there are none"


def wrong_numbers(kind: type, bounds: Bounds) -> list[object]:
    """Numbers, and texts, that a flag must refuse."""
    below = [bounds.least - 1, -1e300] if bounds.least is not None else []
    below += [bounds.above, bounds.above - 1e-9] if bounds.above is not None else []
    above = [bounds.most + 1, bounds.most * 10] if bounds.most is not None else []
    above += [bounds.below, 1e300] if bounds.below is not None else []
    outside = [kind(number) if kind is int and abs(number) < 1e18 else number for number in below + above]
    never = [
        math.nan,
        math.inf,
        -math.inf,
        "1e400",
        "-Infinity",
        "x",
        "",
        "0x10",
        "1,5",
        "1 2",
        "1/2",
        "½",
        "true",
    ]
    if kind is int:
        never += [2**63, -(2**63) - 1, 10**400, 1.5, 2.0, "1e3", "1e", "9" * 5000]
    return [*(number for number in outside if number != bounds.extra), *never]


def ways(folder: Path, name: str, values: list[object]) -> list[list[str]]:
    """A flag with these values on the command line, in YAML and in JSON; in files also as texts."""
    texts = [str(value) for value in values]
    given = [[f"--{name}", *texts], [f"--{name}={texts[0]}"]] if len(texts) == 1 else [[f"--{name}", *texts]]
    for number, each in enumerate((values, texts)):
        content = {name: each if len(each) > 1 else each[0]}
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(content))
        (folder / f"{number}.json").write_text(json.dumps(content))
        given += [["--config", str(folder / f"{number}.{suffix}")] for suffix in ("yaml", "json")]
    return given


@pytest.mark.parametrize(("command", "name"), number_flags())
def test_what_is_out_of_bounds_is_refused_in_a_sentence(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = flags_of(_load(COMMANDS[command].config))[name]
    for wrong in wrong_numbers(flag.kind, bounds_of(command, name)):
        values = [wrong] if flag.count == 1 else [wrong, 5]
        for given in ways(tmp_path, name, values):
            if str(wrong) == "" or (str(wrong).startswith("-") and len(values) > 1):
                continue
            status = main([*command.split(), *arguments(command, name, given)])
            out, err = capsys.readouterr()
            assert (status, out) == (2, ""), (given, values, err)
            assert err.startswith(f"uvit {command}: error: --{name} ") and err.count("\n") == 1, (given, err)
            assert " must " in err, err


PAIRS = {"guidance_interval"}  # any number of pairs


@pytest.mark.parametrize(("command", "name"), number_flags())
def test_what_is_at_the_bounds_is_accepted(command: str, name: str, tmp_path: Path) -> None:
    flag, bounds = flags_of(_load(COMMANDS[command].config))[name], bounds_of(command, name)
    inside = [end for end in (bounds.least, bounds.most, bounds.extra) if end is not None]
    if bounds.most is None and bounds.below is None:
        inside.append(LARGEST if flag.kind is int else 1e308)
    if bounds.above is not None:
        inside.append(bounds.above + (0.5 if bounds.most is None else (bounds.most - bounds.above) / 2))
    if bounds.below is not None:
        inside.append(math.nextafter(bounds.below, -math.inf))
    if name in UNSUPPORTED:
        inside = [1]
    for number in map(flag.kind, inside):
        values = [number] * (2 if name in PAIRS else flag.count or 1)
        for given in ways(tmp_path, name, values):
            value = read(command, name, given)
            assert value == (number if flag.count == 1 else tuple(values)), given


def test_every_seed_has_the_same_bounds() -> None:
    for command in COMMANDS.values():
        cls = _load(command.config)
        if "seed" in typing.get_type_hints(cls):
            assert typing.get_type_hints(cls, include_extras=True)["seed"] == Seed
