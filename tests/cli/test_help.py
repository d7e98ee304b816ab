"""The help screens: every flag once, in groups, within the width; examples that parse."""

import dataclasses
import inspect
import re
import shlex
from dataclasses import dataclass
from typing import Literal

import pytest

from uvit.cli.help import help_text, read_source, show_help
from uvit.cli.main import COMMANDS, _load
from uvit.cli.parse import parse
from uvit.config.train import TrainConfig


@dataclass(frozen=True)
class Config:
    """Do a thing.

    uvit thing NAME --size 3
        --words a b
    """

    # First
    name: str
    """Its name."""
    words: tuple[str, ...] = ()
    """What it says, at a length that does not fit into one line of a terminal that is eighty columns wide."""

    # Second
    kind: Literal["round", "square"] | None = None
    """Its kind."""
    span: tuple[float, float] = (0, 1)
    """From where to where."""
    quick: bool = True
    """Be quick."""


SCREEN = """\
usage: uvit thing NAME [WORDS ...] [FLAGS]

Do a thing.

Example:
  uvit thing NAME --size 3 --words a b

First:
  --name STR                    Its name. (required)
  --words STR ...               What it says, at a length that does not fit into
                                one line of a terminal that is eighty columns
                                wide.

Second:
  --kind {round,square}         Its kind.
  --span FLOAT FLOAT            From where to where. (default: 0 1)
  --quick, --no_quick           Be quick. (default: True)

Every command:
"""


def test_a_screen() -> None:
    assert help_text(Config, "uvit thing", ("name", "words"), width=80).startswith(SCREEN)


def screen(name: str, width: int = 100) -> str:
    return help_text(_load(COMMANDS[name].config), f"uvit {name}", COMMANDS[name].positional, width)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", [80, 100])
def test_each_flag_stands_once_within_the_width(name: str, width: int) -> None:
    lines = screen(name, width).splitlines()
    for field in dataclasses.fields(_load(COMMANDS[name].config)):
        assert len([line for line in lines if re.match(rf"  --{field.name}\b", line)]) == 1, field.name
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("columns", "width"), [("1", 60), ("80", 80), ("300", 120)])
def test_the_width_is_the_terminals_within_reason(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    show_help(TrainConfig, "uvit train")
    assert capsys.readouterr().out == help_text(TrainConfig, "uvit train", width=width) + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_long_screen_has_groups_and_the_most_used_flags_come_first(name: str) -> None:
    cls = _load(COMMANDS[name].config)
    groups = [group for group, _ in read_source(cls).values()]
    if len(dataclasses.fields(cls)) > 10:
        assert groups[0] == "Most used"
        assert 5 <= groups.count("Most used") <= 14
    else:
        assert set(groups) == {""}


def test_the_groups_of_train() -> None:
    groups = list(dict.fromkeys(group for group, _ in read_source(TrainConfig).values()))
    assert groups == [
        "Most used", "Data", "Model", "Text encoder", "Batches", "Optimizer", "Objective", "Alignment",
        "Precision and speed", "Validation", "Evaluation", "Logging", "Checkpoints", "Parallelism",
        "Accepted for PaddleMIX command lines",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_parses(name: str) -> None:
    command = COMMANDS[name]
    cls = _load(command.config)
    [example] = [part for part in (inspect.getdoc(cls) or "").split("\n\n") if part.startswith("uvit ")]
    words = shlex.split(example)
    assert words[: 1 + len(name.split())] == ["uvit", *name.split()]
    parse(cls, words[1 + len(name.split()) :], prog=f"uvit {name}", positional=command.positional)
