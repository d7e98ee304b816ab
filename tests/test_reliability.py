"""What training promises of kills and of disks that take no more; `benchmarks/soak.py` is the long version."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.soak import STEPS, TRAIN, VARIANTS, contents
from tests.checkpoint.test_saver import files_at_most
from uvit.cli.main import main

ROOT = Path(__file__).parents[1]
SOME_STEP = 24  # of the checkpoints that stay, the first
CANNOT_WRITE = r"^uvit train: error: --output_dir run: cannot be written to \(.*{}.*\); fix this"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short soak leaves: features and runs."""
    folder = tmp_path_factory.mktemp("soak")
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--folder", str(folder)]
    command += ["--variants", "plain", "rollback", "--kills", "4"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    (folder / "soak.txt").write_text(done.stdout + done.stderr + f"\nstatus {done.returncode}\n")
    return folder


@pytest.fixture
def train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """A function: more flags -> the status of `uvit train`, in run/ of a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the soak: other numbers compute other bits
    arguments = f"{TRAIN} {VARIANTS['plain']}".replace("FOLDER", str(folder)).split()
    yield lambda *flags: main([*arguments, *flags])
    torch.set_num_threads(num_threads)


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """All files of a run that nothing happened to; run/ is one that got to a checkpoint before its end."""
    shutil.copytree(folder / "plain-whole" / "run", tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*"):
        if path.name != f"checkpoint-{SOME_STEP}":
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "pipeline")
    return contents(folder / "plain-whole" / "run")


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_after_kills_at_any_moment_every_byte_is_the_same(folder: Path) -> None:
    said = (folder / "soak.txt").read_text()
    assert "all is well\n\nstatus 0\n" in said, said
    assert said.count("every byte equal") == 2 and "\n4 kills (" in said, said
    rollback = (folder / "rollback-0" / "output.txt").read_text()
    assert "rolled back to run/checkpoint-" in rollback


def test_a_full_disk_costs_nothing_that_was_saved(
    train: Callable[..., int], whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(Path("run", f"checkpoint-{SOME_STEP}"))
    with files_at_most(300_000):  # less than a file of a checkpoint has, more than a preview
        assert train() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"uvit train: error: --output_dir run: checkpoint-{SOME_STEP + 4} could not be written (")
    assert "File too large" in error and error.count("\n") == 1
    assert [path.name for path in Path("run").glob("*checkpoint-*")] == [f"checkpoint-{SOME_STEP}"]
    assert files_of(Path("run", f"checkpoint-{SOME_STEP}")) == before
    assert train() == 0
    assert contents(Path("run")) == whole


def test_a_disk_too_full_for_a_line_of_the_logs_costs_nothing_either(
    train: Callable[..., int], whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with files_at_most(4_000):  # enough for config.yaml, not for metrics.jsonl
        assert train() == 2
    error = capsys.readouterr().err
    assert re.match(CANNOT_WRITE.format("File too large"), error) and error.count("\n") == 1
    assert train() == 0
    assert contents(Path("run")) == whole


def test_a_disk_too_full_for_the_pipeline_has_all_checkpoints_and_gets_it_later(
    train: Callable[..., int], whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    shutil.rmtree("run/pipeline")
    with files_at_most(300_000):
        assert train() == 2
    captured = capsys.readouterr()
    assert re.match(CANNOT_WRITE.format("File too large"), captured.err)
    assert not Path("run/pipeline").exists()
    assert train() == 0
    assert f"all {STEPS} steps are done" in capsys.readouterr().out
    assert contents(Path("run")) == whole


@pytest.mark.parametrize(("output_dir", "reason"), [("notes.txt", "File exists"), ("notes.txt/run", "Not a directory")])
def test_a_file_in_place_of_the_run_folder_is_a_sentence(
    output_dir: str, reason: str, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").write_text("mine")
    assert train("--output_dir", output_dir) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"uvit train: error: --output_dir {output_dir}: cannot be written to (") and reason in error
    assert Path("notes.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_that_is_read_only_is_a_sentence(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir(mode=0o500)
    assert train() == 2
    assert re.match(CANNOT_WRITE.format("Permission denied"), capsys.readouterr().err)
