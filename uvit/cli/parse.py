"""Arguments and files -> a config dataclass.

Flags, booleans in their several spellings and `--config` files are first turned into one mapping of names to
values; tyro reads that, so one parser gives one meaning and one set of errors, wherever a value came from.
Later wins.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvit.errors import UserError

MANY = ("many", "numbers")
BOOLEANS = {"true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}


def parse(cls: type, arguments: Sequence[str], prog: str, positional: tuple[str, ...] = ()) -> tuple[Any, bool]:
    """-> (an instance of the dataclass `cls`, whether `--print_config` was given). `--help` prints and exits.

    Raises UserError for an unknown flag, a value that does not fit or a file that cannot be read.
    """
    if {"-h", "--help"} & set(arguments):
        _tyro(cls, ["--help"], prog, positional)
    values = collect(cls, arguments, positional)
    print_config = values.pop("print_config", ["False"]) == ["True"]
    missing = [f"--{field.name}" for field in dataclasses.fields(cls) if _required(field) and field.name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; `{prog} --help` lists all flags")
    words, complaint = to_words(values), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return _tyro(cls, words, prog, positional), print_config
    except SystemExit as stop:
        raise _user_error(stop, complaint.getvalue(), cls, values) from None


def _tyro(cls: type, words: list[str], prog: str, positional: tuple[str, ...]) -> Any:
    import tyro

    description = inspect.getdoc(cls) or ""
    if positional:
        description += f"\n\n{' and '.join(name.upper() for name in positional)} may be given without the flag's name."
    description += (
        "\n\nA True/False flag may stand alone (--flag) or be denied (--no_flag). --config FILE reads flags "
        "from YAML or JSON; what comes later wins. --print_config shows the outcome and stops."
    )
    return tyro.cli(
        cls,
        args=words,
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
        use_underscores=True,
    )


def collect(cls: type, arguments: Sequence[str], positional: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """`--name value ...` in all its spellings -> {name: values}; a `--config` file counts where it stands."""
    kinds = _kinds(cls) | {"config": "one", "print_config": "bool"}
    values: dict[str, list[str]] = {}
    loose: list[str] = []  # words that no flag asked for
    named = set()
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            loose += words
            break
        if not word.startswith("--"):
            loose.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds and not equals and kinds.get(name.removeprefix("no_")) == "bool":
            values[name.removeprefix("no_")] = ["False"]
            continue
        kind = _kind(kinds, name)
        if equals:
            items = [value]
        elif kind == "bool":
            items = [words.pop(0)] if words and words[0].lower() in BOOLEANS else ["True"]
        elif kind in MANY:
            items = _take_while_values(words, kind)
        elif words and not words[0].startswith("--"):
            items = [words.pop(0)]
        else:
            raise UserError(f"--{name} needs a value")
        if name == "config":
            values |= collect_file(cls, Path(items[0]))
        else:
            values[name] = _spelled(kind, items)
            named.add(name)
    for name in positional:
        if loose:
            if name in named:
                raise UserError(f"{loose[0]!r} and --{name}: are both given, and mean the same; give one of them")
            taken = len(loose) if kinds[name] == "many" else 1
            values[name], loose = loose[:taken], loose[taken:]
    if loose:
        raise UserError(f"{loose[0]!r} belongs to no flag; flags begin with --, and a value follows its flag")
    return values


def collect_file(cls: type, path: Path) -> dict[str, list[str]]:
    """A YAML or JSON mapping of flags -> {name: values}."""
    import yaml

    where = f"--config {path}: "
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}cannot be read ({reason})") from None
    except (yaml.YAMLError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"{where}is not valid {kind} ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}must map flags to values, and holds {type(content).__name__}")
    kinds = _kinds(cls)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        kind = _kind(kinds, name, where)
        if isinstance(value, dict) or (isinstance(value, list) and kind not in MANY):
            raise UserError(f"{where}{name} holds a {type(value).__name__}; it takes one value")
        values[name] = _spelled(kind, [str(item) for item in value] if isinstance(value, list) else [str(value)])
    return values


def to_words(values: dict[str, list[str]]) -> list[str]:
    """{name: values} -> arguments for tyro; `=` keeps a value that begins with a dash a value."""
    words = []
    for name, items in values.items():
        dashed = next((item for item in items if item.startswith("-") and item != "-"), None)
        if dashed and len(items) > 1:
            raise UserError(f"--{name} {dashed}: where several values are given, none may begin with a dash")
        words += [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *items]
    return words


def _kinds(cls: type) -> dict[str, str]:
    """{field: what its flag takes: "bool", "one" value, "many" or "numbers", which end where words begin}."""

    def kind(hint: Any) -> str:
        if typing.get_origin(hint) in (tuple, list):
            return "numbers" if typing.get_args(hint)[0] in (int, float) else "many"
        return "bool" if hint is bool else "one"

    return {name: kind(hint) for name, hint in _hints(cls).items()}


def _hints(cls: type) -> dict[str, Any]:
    """{field: its type, without `| None`}."""
    hints = typing.get_type_hints(cls)
    for name, hint in hints.items():
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hints[name] = next(option for option in typing.get_args(hint) if option is not type(None))
    return hints


def _kind(kinds: dict[str, str], name: str, where: str = "") -> str:
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean --{close[0]}?" if close else "--help lists all flags"
        raise UserError(f"{where}there is no flag --{name}; {hint}")
    return kinds[name]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _take_while_values(words: list[str], kind: str) -> list[str]:
    """The first whatever it is, so that a mistake is said of the flag."""
    items: list[str] = []
    while words and not words[0].startswith("--") and (not items or kind == "many" or _is_number(words[0])):
        items.append(words.pop(0))
    return items


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _spelled(kind: str, items: list[str]) -> list[str]:
    """Booleans as tyro reads them."""
    return [BOOLEANS.get(item.lower(), item) for item in items] if kind == "bool" else items


def _user_error(stop: SystemExit, complaint: str, cls: type, values: dict[str, list[str]]) -> UserError:
    """What was wrong when tyro gave up: the config's own check, or a value that is not of its flag's type."""
    cause = stop.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if cause is not None:
        return cause
    flag = re.search(r"(?:Error parsing|for argument) '?--(\w+)", " ".join(complaint.translate(UNBOXED).split()))
    if flag is None or flag[1] not in values:
        return UserError(" ".join(complaint.translate(UNBOXED).split()) or "the arguments could not be parsed")
    return UserError(f"--{flag[1]} {' '.join(values[flag[1]])}: must be {_wanted(_hints(cls)[flag[1]])}")


UNBOXED = str.maketrans(dict.fromkeys("╭─╮│╰╯", " "))


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    items = typing.get_args(hint)
    if len(items) > 1 and items[-1] is not ...:
        return f"{len(items)} values, each {_wanted(items[0])}"
    if items:
        hint = items[0]
    words = {bool: "True or False", int: "a whole number", float: "a number"}
    return words.get(hint, f"of type {getattr(hint, '__name__', hint)}")
