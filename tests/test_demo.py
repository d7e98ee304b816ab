"""The demo: four public commands lead from captioned images to generated ones."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from uvit.cli.demo import demo_commands, find_uvit, in_lines, next_steps
from uvit.cli.main import main
from uvit.config.demo import DemoConfig

SCRIPT = Path(__file__).parents[1] / "runs" / "demo.sh"


@pytest.mark.slow
def test_the_demo_runs_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    command = ["demo", "--fast", "--output_dir", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "prompt accuracy on 24 heldout prompts" in text and "chance" in text
    for title, _ in demo_commands(DemoConfig()):
        assert title in text
    assert f"Done. The results are in {out}" in text

    report = json.loads((out / "evaluation" / "report.json").read_text())
    results = {score["name"]: score["value"] for score in report["results"][0]["scores"]}
    assert report["prompts"]["num_prompts"] == 24 and 0 <= results["prompts"] <= results["attributes"] <= 1
    with Image.open(out / "evaluation" / "contact_sheet.png") as sheet:
        assert sheet.width > 800
    images = sorted((out / "samples").glob("0*.png"))
    assert len(images) == 3
    with Image.open(images[0]) as image:
        assert image.size == (32, 32) and "orange circle" in image.text["prompt"]  # type: ignore[attr-defined]
    assert (out / "run" / "previews" / "step-00000020.png").is_file()

    assert main(command) == 0
    text = capsys.readouterr().out
    assert "is complete: 648 pairs" in text and "all 20 steps are done" in text


def test_the_script_has_the_same_commands(tmp_path: Path) -> None:
    """Bash runs it with a `uvit` that prints its arguments."""
    printer = tmp_path / "uvit"
    printer.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    printer.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    output = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in output.splitlines()] == [words for _, words in demo_commands(DemoConfig())]


def test_fast_runs_the_same_commands_with_flags_that_shorten_them() -> None:
    config = DemoConfig(fast=True)
    assert config.folder() == "output/demo-fast" and DemoConfig("here", fast=True).folder() == "here"
    for (_, fast), (_, whole) in zip(
        demo_commands(DemoConfig("output/demo", fast=True)), demo_commands(DemoConfig()), strict=True
    ):
        assert fast[: len(whole)] == whole


def test_a_command_that_fails_ends_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "features").write_text("a file in the way")
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("uvit extract: error: ") and "uvit train" not in shown.out


def test_the_shell_commands_that_are_printed() -> None:
    for _, words in demo_commands(DemoConfig()):
        printed = in_lines(["uvit", *words])
        assert shlex.split(printed.replace("\\\n", " ")) == ["uvit", *words]
        assert max(map(len, printed.splitlines())) <= 120


def test_how_to_call_uvit_where_it_is_not_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "")
    assert find_uvit() == (["python", "-m", "uvit"], [])
    (scripts / "uvit").write_text("")
    (scripts / "uvit").chmod(0o755)
    (scripts / "activate").write_text("")
    assert "Call it as .venv/bin/uvit, or run `source .venv/bin/activate` once" in next_steps("output/demo")
    assert ".venv/bin/uvit sample 'a small" in next_steps("output/demo")
    monkeypatch.setenv("PATH", str(scripts))
    assert find_uvit() == (["uvit"], [])
