"""A path means the same in every flag of every command, however it is given."""

import json
import re
import shlex
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.flags import read
from uvit.cli.main import COMMANDS, _load, main
from uvit.cli.parse import flags_of
from uvit.config.bounds import marks
from uvit.config.extract import ExtractConfig
from uvit.config.paths import IsPath, expand_path, expand_recorded
from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.io import to_yaml

PACKAGE = Path(__file__).parents[2] / "uvit"
TEXTS = {  # what is text, and no path
    "allowed_hosts", "allowed_origins", "api_key", "caption_column", "device", "host", "image_column", "keep_best",
    "license", "negative_prompt", "profiler_options", "prompts", "push_to_hub", "rows", "shard", "split",
    "validation_split",
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder and DATA, which is in it; the commands run elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "home" / "data"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def path_fields() -> list[tuple[str, str]]:
    return [(name, field) for name, command in COMMANDS.items() for field in marks(_load(command.config), IsPath)]


@pytest.mark.parametrize(("command", "name"), path_fields())
def test_every_path_is_expanded_however_it_is_given(command: str, name: str, home: Path) -> None:
    cls = _load(COMMANDS[command].config)
    many = flags_of(cls)[name].count is None
    spellings = {
        "~/data/a b/": f"{home}/data/a b",
        "$DATA/a b": f"{home}/data/a b",
        "${DATA}/a b//": f"{home}/data/a b",
        "$HOME": f"{home}",
        "~": f"{home}",
        "a b/": "a b",
        "a/b/": "a/b",
        "../a": "../a",
        "/": "/",
        "$.tar": "$.tar",
        "https://host/~a$b/": "https://host/~a$b/",
        "hf:user/$name": "hf:user/$name",
        "uvit_t2i_small": "uvit_t2i_small",
    }
    for number, (given, meant) in enumerate(spellings.items()):
        values = [given, "~/x"] if many else [given]
        expected = (meant, f"{home}/x") if many else meant
        yaml_file, json_file = Path(f"{number}.yaml"), Path(f"{number}.json")
        yaml_file.write_text(yaml.safe_dump({name: values if many else given}))
        json_file.write_text(json.dumps({name: values if many else given}))
        ways = [[f"--{name}", *values], ["--config", str(yaml_file)], [f"--config={json_file}"]]
        if not many:
            ways.append([f"--{name}={given}"])
        for way in ways:
            assert read(command, name, way) == expected, way
        if COMMANDS[command].positional[:1] == (name,):
            assert read(command, name, values) == expected


@pytest.mark.parametrize(("command", "name"), path_fields())
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("$NOWHERE/x", "NOWHERE is not set"),
        ("${NOWHERE}", "NOWHERE is not set"),
        ("${DATA:-x}", "DATA:-x is not set"),
        ("$EMPTY/x", "EMPTY is not set"),
        ("", "is no path"),
        (" ", "is no path"),
    ],
)
def test_what_is_no_path_is_named_with_its_flag(
    command: str, name: str, given: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError, match=f"^--{name} .*{re.escape(problem)}"):
        read(command, name, [f"--{name}", *([given, "x"] if name == "paths" else [given])])


def test_every_text_is_a_path_or_is_known_to_be_none() -> None:
    for command in COMMANDS.values():
        cls = _load(command.config)
        texts = {name for name, hint in typing.get_type_hints(cls).items() if str in (hint, *typing.get_args(hint))}
        assert texts - set(marks(cls, IsPath)) <= TEXTS, f"{cls.__name__}: is it a path? then it is a PathFlag"


def test_paths_are_expanded_here_alone() -> None:
    found = [path for path in PACKAGE.rglob("*.py") if re.search(r"expanduser|expandvars", path.read_text("utf-8"))]
    assert found == [PACKAGE / "config" / "paths.py"]


def test_a_config_made_in_python_is_the_same_and_stays_so(home: Path) -> None:
    config = TrainConfig("~/features/", "$DATA/run", uvit_config_file="emoji", logging_dir=None)
    assert (config.feature_path, config.output_dir) == (f"{home}/features", f"{home}/data/run")
    assert (config.uvit_config_file, config.logging_dir) == ("emoji", None)
    assert replace(config, seed=1) == TrainConfig(f"{home}/features", f"{home}/data/run", "emoji", seed=1)


def test_a_recorded_config_is_compared_as_it_was_meant(home: Path) -> None:
    """Earlier versions recorded paths as they were typed."""
    typed = {"feature_path": "~/features/", "output_dir": "$NOWHERE/run", "logging_dir": None, "seed": 3}
    meant = {"feature_path": f"{home}/features", "output_dir": "$NOWHERE/run", "logging_dir": None, "seed": 3}
    assert expand_recorded(TrainConfig, typed) == meant
    assert expand_recorded(ExtractConfig, {"source": ["~/a/", "b", "hf:c/"]}) == {"source": [f"{home}/a", "b", "hf:c/"]}


def test_the_printed_config_holds_the_paths_that_are_used(home: Path) -> None:
    """It reruns the same run where the variables have other values, and a relative path stays relative."""
    printed = yaml.safe_load(to_yaml(TrainConfig("$DATA/features", "output/run")))
    assert (printed["feature_path"], printed["output_dir"]) == (f"{home}/data/features", "output/run")


def test_the_config_file_is_a_path_too(home: Path) -> None:
    home.mkdir()
    (home / "a.yaml").write_text("batch_size: 3")
    for given in ("~/a.yaml", "$HOME/a.yaml", "../home/a.yaml"):
        assert read("bench", "batch_size", ["--config", given]) == 3
    with pytest.raises(UserError, match=r"^--config \$NOWHERE/a.yaml: the environment variable NOWHERE is not set"):
        read("bench", "batch_size", ["--config", "$NOWHERE/a.yaml"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a$b.tar", "a$b.tar"),  # as it is called, if there is one
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("./~/x", "./~/x"),
        ("a~b", "a~b"),
        ("photos=~/x", "photos={home}/x"),
        ("photos=$DATA", "photos={home}/data"),
        ("$DATA/{000..099}.tar", "{home}/data/{000..099}.tar"),
        ("$DATA/*.tar", "{home}/data/*.tar"),
        ("$DATA$DATA", "{home}/data{home}/data"),
        ("$TILDE/x", "{home}/x"),
        ("$URL/a.tar", "https://host/a.tar"),
        ("s3://bucket/$x/", "s3://bucket/$x/"),
        ("pipe:cat x", "pipe:cat x"),
        ("-", "-"),
        ("shapes", "shapes"),
        ("shapes/", "./shapes"),
        ("latest/", "./latest"),
        ("shape/", "shape"),
        ("user/name", "user/name"),
        ("user/name/", "user/name"),
        ("//", "/"),
        ("é~$ü", "é~$ü"),
    ],
)
def test_unusual_paths(given: str, meant: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILDE", "~")
    monkeypatch.setenv("URL", "https://host")
    Path("a$b.tar").touch()
    Path("é~$ü").touch()
    assert expand_path(given, "--source") == meant.replace("{home}", str(home))


def test_a_path_with_a_nul_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text('uvit_config_file: "a\\0b"')
    assert main(["bench", "--config", "a.yaml"]) == 2
    assert (
        capsys.readouterr().err
        == "uvit bench: error: --uvit_config_file 'a\\x00b': is no path; give one, or leave the flag out\n"
    )


@pytest.mark.parametrize("folder", ["a b", "it's", "a$b", "a;b", "a  b"])
def test_a_path_in_a_hint_can_be_pasted(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(folder).mkdir()
    assert main(["sample", "x", "--pipeline", f"./{folder}"]) == 2
    hint = capsys.readouterr().err.strip().rpartition("encoders: ")[2]
    assert shlex.split(hint)[:4] == ["uvit", "convert", f"./{folder}", "pipeline"]
