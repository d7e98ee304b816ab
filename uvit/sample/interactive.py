"""`uvit sample` on a terminal: one prompt after another."""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from uvit.config.sample import SampleConfig
from uvit.errors import UserError

WELCOME = "Type what to draw. /seed 5 changes a setting, / shows all of them, Ctrl-D ends."
ASK = "draw> "


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


# What can be changed between prompts, and how it is read. With nothing after its name, a setting goes back to the
# command's own.
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "seed": (int, "a whole number"),
    "num_images_per_prompt": (int, "a whole number"),
    "guidance_scale": (_numbers, "a number, or several"),
    "num_inference_steps": (int, "a whole number"),
    "negative_prompt": (str, "words"),
    "strength": (float, "a number"),
}


def interactive(config: SampleConfig, draw: Callable[[SampleConfig, str], None]) -> None:
    """Ask, draw, and ask again, until the input ends. Each image has the seed after the one before.

    Ctrl-C while drawing stops the drawing; while asking, it ends.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and a history, where Python has it
    given = config
    print(WELCOME)
    while True:
        try:
            line = input(ASK).strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                config = changed(config, line[1:], given)
                continue
            draw(config, line)
            config = dataclasses.replace(config, seed=config.seed + config.num_images_per_prompt)
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\nstopped")


def changed(config: SampleConfig, words: str, given: SampleConfig) -> SampleConfig:
    """`seed 5` -> the config with it; `seed` alone: as at the start; nothing: all are printed. Raises UserError."""
    name, _, value = words.strip().partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        print("\n".join(f"/{name} {_shown(getattr(config, name))}" for name in SETTINGS))
        return config
    if name not in SETTINGS:
        close = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"did you mean /{close[0]}?" if close else f"there are /{', /'.join(SETTINGS)}"
        raise UserError(f"/{name}: there is no such setting; {hint}")
    read, wanted = SETTINGS[name]
    try:
        after = read(value) if value else getattr(given, name)
    except ValueError:
        raise UserError(f"/{name} {value}: must be {wanted}") from None
    config = dataclasses.replace(config, **{name: after})
    print(f"/{name} {_shown(after)}")
    return config


def _shown(value: Any) -> str:
    return " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else "" if value is None else str(value)
