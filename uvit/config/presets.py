"""Configs that ship with the package, known by their names."""

import difflib
from pathlib import Path

from uvit.errors import UserError

FOLDER = Path(__file__).parents[1] / "presets"


def preset_files(kind: str) -> dict[str, Path]:
    """{name: file} of the presets of a kind: `model`, or a command such as `train`, for its --config."""
    return {path.stem: path for path in sorted((FOLDER / kind).glob("*.*"))}


def no_such_preset(kind: str, flag: str, given: str) -> UserError:
    """The error, with the names that there are."""
    names = list(preset_files(kind))
    close = difflib.get_close_matches(Path(given).stem, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UserError(f"{flag} {given}: is neither a file nor a preset; {hint}the presets are {', '.join(names)}")


def find_config(command: str, given: str) -> Path:
    """The file that `--config` names: its path, or the name of a preset. Raises UserError if a command's presets do not
    have it; without presets the path is returned as it is.
    """
    path, presets = Path(given), preset_files(command)
    if path.is_file() or not presets:
        return path
    if given not in presets:
        raise no_such_preset(command, "--config", given)
    return presets[given]
