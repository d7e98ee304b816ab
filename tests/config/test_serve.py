from typing import Any

import pytest

from uvit.config.serve import ServeConfig
from uvit.errors import UserError


def test_names_of_models() -> None:
    models = ("output/run", "output/other/pipeline", "small=a/b=c", "two words/x y")
    assert ServeConfig(models).named_models() == [
        ("run", "output/run"),
        ("other", "output/other/pipeline"),
        ("small", "a/b=c"),
        ("x-y", "two words/x y"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": ()}, "--models"),
        ({"models": ("a/run", "b/run")}, "two are called run"),
        ({"models": ("a@b=run",)}, "choose another"),
        ({"num_inference_steps": 300}, "--max_steps 250"),
        ({"api_key": "schlüssel"}, "ASCII"),
        ({"allowed_origins": ("example.org",)}, "https://example.org"),
        ({"port": 70_000}, "--port"),
    ],
)
def test_what_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServeConfig(**{"models": ("run",), **flags})


def test_loopback() -> None:
    assert [ServeConfig(("x",), host=h).is_loopback() for h in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "b")] == [
        True, True, True, False, False,
    ]  # fmt: skip
