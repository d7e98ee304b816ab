"""Paths in flags: `output_dir: PathFlag`. `~` and environment variables in them are expanded here, and nowhere else."""

import os
import re
from typing import Annotated, Any

from uvit.config.bounds import marks
from uvit.errors import UserError


class IsPath:
    """Marks a field whose texts are paths, or names that stand where a path may."""


PathFlag = Annotated[str, IsPath()]

_NO_PATH = re.compile(r"[A-Za-z][\w+.-]*://|hf:|-$")  # a URL, an id on the Hub, standard input
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})")  # $NAME or ${NAME}
_HOME = re.compile(r"(\w+=)?(~.*)", re.DOTALL)  # ~ or ~user, also in NAME=PATH


def expand_path(path: str, where: str) -> str:
    """A path with `~` and environment variables expanded, and without slashes at its end.

    A relative path stays relative. URLs, ids on the Hub (`hf:...`) and names of presets stay as they are. `shapes/`
    becomes `./shapes`: a slash at its end makes a word a folder, not a preset. Also in NAME=PATH.

    Raises UserError where the path is empty, or a variable is not set.
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

    if not path or "\0" in path:
        raise UserError(f"{where} {path!r}: is no path; give one, or leave the flag out")
    expanded = path if _NO_PATH.match(path) else _VARIABLE.sub(value_of, path)
    if _NO_PATH.match(expanded):
        return expanded
    if match := _HOME.fullmatch(expanded):
        expanded = (match[1] or "") + os.path.expanduser(match[2])  # noqa: PTH111  # Path's raises for ~nobody
    bare = expanded.rstrip("/")
    if not bare:
        return "/"
    return bare if bare == expanded or "/" in bare else f"./{bare}"


def expand_paths(config: Any) -> None:
    """Expand the paths of a config that is being made, in place."""
    for name in marks(type(config), IsPath):
        value = getattr(config, name)
        if isinstance(value, str | os.PathLike):
            object.__setattr__(config, name, expand_path(os.fspath(value), f"--{name}"))
        elif value is not None:
            object.__setattr__(config, name, tuple(expand_path(os.fspath(path), f"--{name}") for path in value))
