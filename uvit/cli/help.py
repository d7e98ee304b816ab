"""The help screen of a command, from its config dataclass.

Its docstring says what the command does; a paragraph that begins with `uvit` is an example. The string after a field
is the help of its flag, and a comment above a field begins a group.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from itertools import pairwise
from typing import Any

from uvit.cli.parse import Flag, flags_of
from uvit.config.presets import preset_files

UNBROKEN: Any = {"break_long_words": False, "break_on_hyphens": False}
COLUMN = 32  # where the texts begin
GENERAL_HELP = {
    "--config FILE": "Read flags from a YAML or JSON file{preset}. Later flags win.",
    "--print_config": "Print the resolved config as YAML, and exit.",
    "-h, --help": "Show this message, and exit.",
}
NOTE = "True/False flags: --flag or --flag True turns one on, --no_flag or --flag False turns it off."


def show_help(cls: type, prog: str, positional: tuple[str, ...] = ()) -> None:
    columns = shutil.get_terminal_size((100, 24)).columns
    print(help_text(cls, prog, positional, width=min(max(columns, 60), 120)))


def help_text(cls: type, prog: str, positional: tuple[str, ...] = (), width: int = 100) -> str:
    flags, texts = flags_of(cls), read_source(cls)
    blocks = [textwrap.fill(_usage(flags, prog, positional), width, subsequent_indent=" " * 7, **UNBROKEN)]
    for paragraph in (inspect.getdoc(cls) or "").split("\n\n"):
        words = " ".join(paragraph.split())
        blocks.append(_example(words, width) if words.startswith("uvit ") else textwrap.fill(words, width))
    groups: dict[str, list[str]] = {}
    for name, flag in flags.items():
        group, text = texts[name]
        groups.setdefault(group or "Flags", []).append(_row(_left(flag), f"{text} {_default(flag)}".strip(), width))
    presets = list(preset_files(prog.removeprefix("uvit ")))
    preset = f", or from a preset: {', '.join(presets)}" if presets else ""
    groups["Every command"] = [_row(left, text.format(preset=preset), width) for left, text in GENERAL_HELP.items()]
    blocks += ["\n".join([f"{group}:", *rows]) for group, rows in groups.items()]
    return "\n\n".join([*blocks, textwrap.fill(NOTE, width)])


def read_source(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (its group, its help)}, of the bases first, as the fields are ordered."""
    found: dict[str, tuple[str, str]] = {}
    for part in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        source = textwrap.dedent(inspect.getsource(part))
        lines, group = source.splitlines(), ""
        [definition] = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node, after in pairwise([*definition.body, ast.Pass()]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above = lines[node.lineno - 2].strip()
                group = above.removeprefix("# ") if above.startswith("# ") else group
                text = after.value if isinstance(after, ast.Expr) else None
                words = str(text.value).split() if isinstance(text, ast.Constant) else []
                found[node.target.id] = group, " ".join(words)
    return found


def _usage(flags: dict[str, Flag], prog: str, positional: tuple[str, ...]) -> str:
    words = ["usage:", prog]
    for name in positional:
        word = name.upper() + (" ..." if flags[name].count is None else "")
        words.append(word if flags[name].required else f"[{word}]")
    words += [_left(flag) for name, flag in flags.items() if flag.required and name not in positional]
    return " ".join([*words, "[FLAGS]"])


def _example(words: str, width: int) -> str:
    whole = re.sub(r"(--\w+) (?!--)", "\\1\xa0", words)  # a flag and its value stay on one line
    lines = textwrap.wrap(whole, width - 2, initial_indent="  ", subsequent_indent="      ", **UNBROKEN)
    return "Example:\n" + " \\\n".join(lines).replace("\xa0", " ")


def _left(flag: Flag) -> str:
    """The flag and what it takes."""
    if flag.kind is bool:
        return f"--{flag.name}, --no_{flag.name}" if flag.default else f"--{flag.name}"
    kind = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.kind.__name__.upper()
    return f"--{flag.name} {kind} ..." if flag.count is None else " ".join([f"--{flag.name}", *[kind] * flag.count])


def _default(flag: Flag) -> str:
    if flag.required:
        return "(required)"
    if flag.default is None or flag.default == ():
        return ""
    shown = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
    return f"(default: {shown})"


def _row(left: str, text: str, width: int) -> str:
    head = f"  {left}"
    if len(head) > width:  # many choices
        head = "\n".join(textwrap.wrap(head.replace(",", ", "), width, subsequent_indent=" " * 6, **UNBROKEN))
    body = textwrap.wrap(text, max(width - COLUMN, 30), **UNBROKEN)
    if len(head) + 2 <= COLUMN and body:
        head, body = head.ljust(COLUMN) + body[0], body[1:]
    return "\n".join([head, *(" " * COLUMN + line for line in body)])
