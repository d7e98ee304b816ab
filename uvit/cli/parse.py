"""Arguments and files -> a config dataclass.

Flags, booleans in their several spellings and `--config` files are first turned into one list of `--name value`; tyro
reads that list, so one parser gives one meaning and one set of errors, wherever a value came from. Later wins.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvit.errors import UserError

BOOLEANS = {"true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}


def parse(cls: type, arguments: Sequence[str], prog: str, positional: tuple[str, ...] = ()) -> tuple[Any, bool]:
    """-> (an instance of the dataclass `cls`, whether `--print_config` was given). `--help` prints and exits.

    Raises UserError for an unknown flag, a value that does not fit or a file that cannot be read.
    """
    import tyro

    description = cls.__doc__ or ""
    if positional:
        description += f"\n\nWithout a flag: {' '.join(name.upper() for name in positional)}."
    values = {} if {"-h", "--help"} & set(arguments) else collect(cls, arguments, positional)
    print_config = bool(values.pop("print_config", False))
    words = ["--help"] if not values and {"-h", "--help"} & set(arguments) else to_words(values)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(
                cls,
                args=words,
                prog=prog,
                description=description,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
                use_underscores=True,
                console_outputs=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_sentence(complaint.getvalue())) from None
    return config, print_config


def collect(cls: type, arguments: Sequence[str], positional: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """`--name value ...` in all its spellings -> {name: values}; a `--config` file counts where it stands."""
    kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(cls).items()}
    values: dict[str, list[str]] = {}
    loose: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            loose.extend([word] if word != "--" else words)
            if word == "--":
                break
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == "print_config":
            values[name] = ["True"]
            continue
        if name == "config":
            path = value if equals else _next(words, "config")
            values |= collect_file(cls, Path(path))
            continue
        if name not in kinds and name.startswith("no_") and kinds.get(name[3:]) == "bool":
            values[name[3:]] = ["False"]
            continue
        kind = _known(cls, kinds, name)
        if equals:
            values[name] = [value]
        elif kind == "bool":
            values[name] = [words.pop(0) if words and words[0].lower() in BOOLEANS else "True"]
        elif kind == "many":
            values[name] = []
            while words and not words[0].startswith("--"):
                values[name].append(words.pop(0))
        else:
            values[name] = [_next(words, name)]
        if kind == "bool":
            values[name] = [BOOLEANS.get(values[name][0].lower(), values[name][0])]
    for name in positional:
        if loose:
            many = kinds[name] == "many"
            values[name], loose = (loose, []) if many else (loose[:1], loose[1:])
    if loose:
        raise UserError(f"{loose[0]!r} is not a flag; flags begin with --")
    return values


def collect_file(cls: type, path: Path) -> dict[str, list[str]]:
    """A YAML or JSON mapping of flags -> {name: values}."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {path}: is not valid {path.suffix[1:] or 'YAML'} ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must map flags to values, and holds {type(content).__name__}")
    kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(cls).items()}
    values = {}
    for name, value in content.items():
        _known(cls, kinds, str(name), where=f"--config {path}: ")
        values[str(name)] = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return values


def to_words(values: dict[str, list[str]]) -> list[str]:
    """{name: values} -> arguments; `=` keeps a value that begins with a dash a value."""
    words = []
    for name, items in values.items():
        words += [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *items]
    return words


def to_yaml(config: Any) -> str:
    """The resolved config, as a file that `--config` reads back to the same config."""
    import yaml

    content = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    return "bool" if hint is bool else "many" if typing.get_origin(hint) in (tuple, list) else "one"


def _known(cls: type, kinds: dict[str, str], name: str, where: str = "") -> str:
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean --{close[0]}?" if close else "see --help"
        raise UserError(f"{where}there is no flag --{name}; {hint}")
    return kinds[name]


def _next(words: list[str], name: str) -> str:
    if not words or words[0].startswith("--"):
        raise UserError(f"--{name} needs a value")
    return words.pop(0)


def _sentence(complaint: str) -> str:
    """tyro's boxed message as one line."""
    text = " ".join(complaint.translate(str.maketrans("╭─╮│╰╯", "      ")).split())
    return text.removeprefix("Parsing error ").split(" For full helptext")[0] or "the arguments could not be parsed"


