"""Numbers are checked where their fields are declared, in every config alike."""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uvit.cli.main import COMMANDS, _load
from uvit.config.bounds import (
    LARGEST,
    Bounds,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_bounds,
)
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


NUMBERS = st.integers() | st.integers(2**62, 2**70) | st.floats() | st.sampled_from([0, -1, 1, 0.0, 1.0, 10**400])
REQUIRED = {"vae_name_or_path": "x", "text_encoder_name_or_path": "x", "paths": ("a", "b")}


def numbers(hint: Any) -> set[type]:
    return {kind for kind in (hint, *typing.get_args(hint)) if kind in (int, float)}


def number_fields() -> list[tuple[type, str]]:
    configs = [_load(command.config) for command in COMMANDS.values()]
    return [(cls, name) for cls in configs for name, hint in typing.get_type_hints(cls).items() if numbers(hint)]


@pytest.mark.parametrize(("cls", "name"), number_fields(), ids=lambda value: getattr(value, "__name__", value))
@given(data=st.data())
def test_any_number_in_any_flag_is_accepted_or_refused_in_a_sentence(cls: type, name: str, data: st.DataObject) -> None:
    hint = typing.get_type_hints(cls)[name]
    many = typing.get_origin(hint) is tuple
    length = len(typing.get_args(hint)) if many and ... not in typing.get_args(hint) else 1
    of_kind = NUMBERS.filter(lambda number: type(number) in numbers(hint))
    value: Any = tuple(data.draw(of_kind) for _ in range(length)) if many else data.draw(of_kind)
    needed = {f.name: REQUIRED.get(f.name, "x") for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if cls.__name__ == "ExtractConfig":
        needed["text_encoder_name_or_path"] = "x"
    try:
        config = cls(**{**needed, name: value})
    except UserError as error:
        assert f"--{name} " in str(error)
        return
    found = getattr(config, name)
    assert all(abs(number) < 2**63 or isinstance(number, float) for number in (found if many else [found]))
    assert all(math.isfinite(number) for number in (found if many else [found]))


def test_every_seed_has_the_same_bounds() -> None:
    for command in COMMANDS.values():
        cls = _load(command.config)
        if "seed" in typing.get_type_hints(cls):
            assert typing.get_type_hints(cls, include_extras=True)["seed"] == Seed
