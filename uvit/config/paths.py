"""Paths in flags: `output_dir: PathFlag`. `~` and environment variables in them are expanded here, and nowhere else."""

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from uvit.config.bounds import marks
from uvit.errors import UserError


class IsPath:
    """Marks a field whose texts are paths, or names that stand where a path may."""


PathFlag = Annotated[str, IsPath()]

NAMES = ("shapes", "latest")  # have a meaning of their own; with a slash at the end they are folders
_NO_PATH = re.compile(r"[A-Za-z][\w+.-]*://|hf:|-$")  # a URL, an id on the Hub, standard input
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})")  # $NAME or ${NAME}
_HOME = re.compile(r"(\w+=)?(~.*)", re.DOTALL)  # ~ or ~user, also in NAME=PATH


def expand_path(path: str, where: str) -> str:
    """A path with `~` and environment variables expanded, and without slashes at its end.

    A relative path stays relative. URLs, ids on the Hub (`hf:...`) and names of presets stay as they are.

    Raises UserError where the path is empty or blank, or a variable is not set.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if value := os.environ.get(name, ""):
            return value
        if os.path.lexists(path):  # a file may be called a$b
            return match[0]
        raise UserError(
            f"{where} {path}: the environment variable {name} is not set; set it, or write the path without it"
        )

    if not path.strip() or "\0" in path:
        raise UserError(f"{where} {path!r}: is no path; give one, or leave the flag out")
    expanded = path if _NO_PATH.match(path) else _VARIABLE.sub(value_of, path)
    if _NO_PATH.match(expanded):
        return expanded
    if match := _HOME.fullmatch(expanded):
        expanded = (match[1] or "") + os.path.expanduser(match[2])  # noqa: PTH111  # Path's raises for ~nobody
    bare = expanded.rstrip("/")
    if bare in NAMES and bare != expanded:
        return f"./{bare}"
    return bare or "/"


def expand_paths(config: Any) -> None:
    """Expand the paths of a config that is being made, in place."""
    for name in marks(type(config), IsPath):
        object.__setattr__(config, name, _expand_value(getattr(config, name), name))


def expand_recorded(cls: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config of class `cls` in a file, with its paths expanded: earlier versions recorded them as they
    were typed. What cannot be expanded stays as it is.
    """
    values = dict(recorded)
    for name in marks(cls, IsPath).keys() & recorded.keys():
        with contextlib.suppress(UserError):
            values[name] = _expand_value(recorded[name], name)
    return values


def _expand_value(value: Any, name: str) -> Any:
    """The value of a field: a path, several in a tuple or list, or None."""
    if isinstance(value, tuple | list):
        return type(value)(_expand_value(path, name) for path in value)
    return None if value is None else expand_path(os.fspath(value), f"--{name}")
