"""`uvit sample` on a terminal: one prompt after another."""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from uvit.config.sample import SampleConfig
from uvit.errors import UserError

WELCOME = "Type a prompt. /seed 5 changes a setting, / lists the settings, Ctrl-D quits."
INPUT_PROMPT = "prompt> "


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


# The settings that can change between prompts, and how each is read. A name without a value restores the value of the
# command line.
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "seed": (int, "a whole number"),
    "num_images_per_prompt": (int, "a whole number"),
    "guidance_scale": (_numbers, "a number, or several numbers"),
    "num_inference_steps": (int, "a whole number"),
    "negative_prompt": (str, "text"),
    "strength": (float, "a number"),
}


def interactive(config: SampleConfig, generate: Callable[[SampleConfig, str], None]) -> None:
    """Read a prompt, generate, and repeat until the input ends. Each image adds 1 to the seed.

    Ctrl-C stops the current image; at the prompt it ends the command.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and a history, where Python has it
    initial = config
    print(WELCOME)
    while True:
        try:
            line = input(INPUT_PROMPT).strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                config = change_setting(config, line[1:], initial)
                continue
            generate(config, line)
            config = dataclasses.replace(config, seed=config.seed + config.num_images_per_prompt)
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\nstopped")


def change_setting(config: SampleConfig, words: str, initial: SampleConfig) -> SampleConfig:
    """`seed 5` sets the seed, `seed` restores its initial value, "" prints all settings. Raises UserError."""
    name, _, value = words.strip().partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        print("\n".join(f"/{name} {_formatted(getattr(config, name))}" for name in SETTINGS))
        return config
    if name not in SETTINGS:
        close = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"did you mean /{close[0]}?" if close else f"the settings are /{', /'.join(SETTINGS)}"
        raise UserError(f"/{name}: there is no such setting; {hint}")
    parse, expected = SETTINGS[name]
    try:
        parsed = parse(value) if value else getattr(initial, name)
    except ValueError:
        raise UserError(f"/{name} {value}: must be {expected}") from None
    config = dataclasses.replace(config, **{name: parsed})
    print(f"/{name} {_formatted(parsed)}")
    return config


def _formatted(value: Any) -> str:
    return " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else "" if value is None else str(value)
