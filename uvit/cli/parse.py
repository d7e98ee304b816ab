"""Command line arguments and `--config` files -> a config dataclass. Later values win."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvit.cli.other_names import config_hint, flag_hint, value_hint
from uvit.config.paths import expand_path
from uvit.config.presets import find_config
from uvit.errors import UserError, a_type

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


# Flags


@dataclass(frozen=True)
class Flag:
    name: str
    kind: Any  # of one value: str, int, float, bool or a Literal
    count: int | None = 1  # number of values; None: any
    optional: bool = False  # whether None is a value
    required: bool = False
    default: Any = None

    def read(self, items: Sequence[str]) -> Any:
        """The strings of a command line or a file -> the field's value. Raises UserError if they do not fit."""
        if self.optional and list(items) == ["None"]:
            return None
        if hint := value_hint(self.name, items):
            raise UserError(f"--{self.name} {' '.join(items)}: {hint}")
        try:
            if self.count not in (None, len(items)):
                raise ValueError
            values = tuple(_read(self.kind, item) for item in items)
        except ValueError:
            raise UserError(f"--{self.name} {' '.join(items)}: must be {self._wanted()}") from None
        return values[0] if self.count == 1 else values

    def _wanted(self) -> str:
        words = {bool: "True or False", int: "a whole number", float: "a number"}
        one = words.get(self.kind) or (f"one of {', '.join(self.choices)}" if self.choices else "text")
        return one if self.count in (None, 1) else f"{self.count} values, each {one}"

    @property
    def choices(self) -> list[str]:
        """Those of a Literal."""
        return [str(choice) for choice in typing.get_args(self.kind)]


def _read(kind: Any, text: str) -> Any:
    """Raises ValueError if a text is not of a kind."""
    if kind in (str, int, float):
        return kind(text)
    words = BOOLEANS if kind is bool else {str(choice): choice for choice in typing.get_args(kind)}
    if (word := text.lower() if kind is bool else text) not in words:
        raise ValueError
    return words[word]


def flags_of(cls: type) -> dict[str, Flag]:
    """{name: flag} of a config dataclass, in its order."""
    hints = typing.get_type_hints(cls)
    flags = {}
    for field in dataclasses.fields(cls):
        kind, optional = hints[field.name], False
        count: int | None = 1
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
            kind, optional = next(item for item in typing.get_args(kind) if item is not type(None)), True
        if typing.get_origin(kind) is tuple:
            kind, *others = typing.get_args(kind)
            count = None if others == [...] else 1 + len(others)
        required = field.default is dataclasses.MISSING
        flags[field.name] = Flag(field.name, kind, count, optional, required, None if required else field.default)
    return flags


GENERAL = {"config": Flag("config", str), "print_config": Flag("print_config", bool)}  # flags of every command


# Arguments and files


def parse(cls: type, arguments: Sequence[str], prog: str, positional: tuple[str, ...] = ()) -> tuple[Any, bool]:
    """-> (an instance of the dataclass `cls`, whether `--print_config` was given).

    Raises UserError for an unknown flag, a value that does not fit or a file that cannot be read.
    """
    flags = flags_of(cls)
    values = collect(flags, arguments, positional, command=prog.removeprefix("uvit "))
    print_config = GENERAL["print_config"].read(values.pop("print_config", ["False"]))
    missing = [f"--{name}" for name, flag in flags.items() if flag.required and name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; `{prog} --help` lists all flags")
    return cls(**{name: flags[name].read(items) for name, items in values.items()}), print_config


def collect(
    flags: Mapping[str, Flag], arguments: Sequence[str], positional: tuple[str, ...] = (), command: str = ""
) -> dict[str, list[str]]:
    """`--name value ...` in all its spellings -> {name: values}; a `--config` file counts where it stands."""
    known = {**flags, **GENERAL}
    values: dict[str, list[str]] = {}
    named = set()  # flags given by name, not by file
    loose: list[str] = []  # words that follow no flag
    words = list(arguments)
    while words and (word := words.pop(0)) != "--":
        if not word.startswith("--"):
            loose.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        denied = name.removeprefix("no_")
        if name not in known and not equals and denied in known and known[denied].kind is bool:
            values[denied] = ["False"]
            continue
        flag = _find(known, name)
        items = [value] if equals else _take(flag, words)
        if name == "config" and (hint := config_hint(items[0])):
            raise UserError(f"--config {items[0]}: {hint}")
        if name == "config":
            values |= collect_file(flags, find_config(command, expand_path(items[0], "--config")))
        else:
            values[name] = items
            named.add(name)
    dashed = [word for word in loose if word.startswith("-") and word != "-"]
    if dashed and len(loose) > 1:
        raise UserError(f"{dashed[0]!r} is no flag; flags begin with --, and -- alone goes before words with a dash")
    loose += words  # what follows `--`
    for name in positional:
        if loose and name in named:
            raise UserError(f"{loose[0]!r} and --{name}: are both given, and mean the same; give one of them")
        if loose:
            number = len(loose) if flags[name].count is None else 1
            values[name], loose = loose[:number], loose[number:]
    if loose:
        raise UserError(f"{loose[0]!r} belongs to no flag; flags begin with --, and a value follows its flag")
    return values


def collect_file(flags: Mapping[str, Flag], path: Path) -> dict[str, list[str]]:
    """A YAML or JSON mapping of flags -> {name: values}."""
    where = f"--config {path}: "
    content = _load(path, where)
    if content is None:
        return {}  # an empty file
    if not isinstance(content, dict):
        raise UserError(f"{where}must map flags to values, and holds {type(content).__name__}")
    values = {}
    for key, value in content.items():
        flag = _find(flags, str(key).replace("-", "_"), where)
        if isinstance(value, dict) or (isinstance(value, list) and flag.count == 1):
            raise UserError(f"{where}{flag.name} holds {a_type(value)}; it takes one value")
        if value is None and not flag.optional:
            raise UserError(f"{where}{flag.name} is empty; give it a value, or leave it out")
        if flag.name in values:
            raise UserError(f"{where}{flag.name} is there twice; remove one")
        values[flag.name] = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return values


def _load(path: Path, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads all values but null as text: as on a command line, 007, 1_000 and no are what is written."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"{twice} is there twice")
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [each for each in known if each[0].endswith((":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}cannot be read ({reason})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"{where}is not valid {kind} ({' '.join(str(error).split())})") from None


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Raises ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice")
    return found


def _find(flags: Mapping[str, Flag], name: str, where: str = "") -> Flag:
    if name not in flags:
        close = difflib.get_close_matches(name, flags, n=1)
        likely = f"did you mean --{close[0]}?" if close else "--help lists all flags"
        raise UserError(f"{where}there is no flag --{name}; {flag_hint(name) or likely}")
    return flags[name]


def _take(flag: Flag, words: list[str]) -> list[str]:
    """Take a flag's values from the words that follow it. Numbers end where other words begin."""
    if flag.kind is bool:
        return [words.pop(0)] if words and words[0].lower() in BOOLEANS else ["True"]
    items: list[str] = []
    while words and not words[0].startswith("--"):
        if items and (flag.count == 1 or (flag.kind in (int, float) and not _is_number(words[0]))):
            break
        items.append(words.pop(0))
    if not items and (flag.count is not None or flag.required):
        raise UserError(f"--{flag.name} needs a value")
    for item in items if len(items) > 1 else []:
        if item.startswith("-") and item != "-" and not (flag.kind in (int, float) and _is_number(item)):
            raise UserError(f"--{flag.name} {item}: where several values are given, none may begin with a dash")
    return items


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
