"""A folder has one writer: a second process is refused by name, and what a dead one left is in nobody's way."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_trainer import lines
from uvit.checkpoint.folder import checkpoint_folders
from uvit.cli.main import main
from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.export.convert import write_folder
from uvit.io import write_yaml
from uvit.lock import LOCK, WriterLock
from uvit.train.trainer import train

Started = subprocess.Popen[str]


def start(arguments: list[str], until: str) -> Started:
    """`uvit ARGUMENTS` in a process of its own, once it has printed `until`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvit", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"ended with {process.wait()}")


def end(process: Started, number: int) -> int:
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


@pytest.fixture
def endless(tiny_config: Any) -> TrainConfig:
    """The config of a run that does not end by itself."""
    return tiny_config(max_steps=100_000, save_steps=100_000)  # type: ignore[no-any-return]


@pytest.fixture
def running(endless: TrainConfig, tmp_path: Path) -> Iterator[Started]:
    write_yaml(endless, tmp_path / "config.yaml")
    process = start(["train", "--config", str(tmp_path / "config.yaml")], "step 4/")
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(
    running: Started, tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    before = sorted(path.name for path in tmp_path.iterdir())
    for output_dir in (str(tmp_path / "run"), "../link", "../run/../run/", "."):
        for flags in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
            message = rf"^--output_dir .*: is in use by process {running.pid} on \S+, since \d{{4}}-\d\d-\d\d .*;"
            with pytest.raises(UserError, match=message):
                train(tiny_config(output_dir=output_dir, **flags))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert train(tiny_config(output_dir=str(tmp_path / "other"))) == 0
    assert end(running, signal.SIGTERM) == 128 + signal.SIGTERM
    [last] = checkpoint_folders(tmp_path / "run")
    step = int(last.name.split("-")[1])
    assert train(tiny_config(output_dir=str(tmp_path / "link"), max_steps=step + 1)) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, step + 2))
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_killed_run_is_resumed_at_once(running: Started, tiny_config: Any, tmp_path: Path) -> None:
    assert (tmp_path / "run" / LOCK).exists()
    assert end(running, signal.SIGKILL) == -signal.SIGKILL
    assert train(tiny_config()) == 0
    assert not list((tmp_path / "run").glob(".*"))


def test_ctrl_c_leaves_no_lock(running: Started, tmp_path: Path) -> None:
    assert end(running, signal.SIGINT) == 128 + signal.SIGINT
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_whose_lock_is_taken_away_stops(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who removes the file, or moves the folder; here before the first step."""
    monkeypatch.setattr("uvit.lock.HEARTBEAT_SECONDS", 0.001)
    real = WriterLock.check

    def check(lock: WriterLock) -> None:
        lock.path.unlink()
        lock._thread.join(60)
        real(lock)

    monkeypatch.setattr(WriterLock, "check", check)
    with pytest.raises(UserError, match="is no longer this process's"):
        train(tiny_config())
    assert lines(tmp_path / "run") == []


def test_two_runs_do_not_share_their_logs(running: Started, tiny_config: Any, tmp_path: Path) -> None:
    other = {"output_dir": str(tmp_path / "other"), "logging_dir": str(tmp_path / "logs")}
    with pytest.raises(UserError, match=r"--logging_dir .*: is in use"), WriterLock(tmp_path / "logs" / LOCK, "logs"):
        train(tiny_config(**other))
    with pytest.raises(UserError, match=r"--logging_dir .*: is in use"):
        train(tiny_config(**other | {"logging_dir": str(tmp_path / "run")}))
    assert train(tiny_config(**other)) == 0
    assert not (tmp_path / "logs" / LOCK).exists() and (tmp_path / "run" / LOCK).exists()


def test_a_run_that_fails_leaves_no_lock_and_no_new_folder(tiny_config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        train(tiny_config(resume_from_checkpoint="nowhere"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="not finite"):
        train(tiny_config(learning_rate=1e30, warmup_steps=1, max_steps=50, max_nonfinite_steps=3))
    assert (tmp_path / "run").exists() and not list((tmp_path / "run").glob(".*"))


def test_an_autoencoder_has_one_writer_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--source shapes --device cpu --resolution 16 --factor 4 --channels 8 --batch_size 2 --save_steps 2"
    arguments = ["autoencoder", *flags.split(), "--output_dir", str(tmp_path / "vae"), "--disable_tqdm"]
    process = start([*arguments, "--max_steps", "100000"], "saved ")
    try:
        for more in ([], ["--overwrite_output_dir"]):
            assert main([*arguments, "--max_steps", "4", *more]) == 2
            assert re.search(rf"in use by process {process.pid} on", capsys.readouterr().err)
    finally:
        end(process, signal.SIGKILL)
    assert main([*arguments, "--max_steps", "4", "--overwrite_output_dir"]) == 0
    assert (tmp_path / "vae" / "config.json").exists() and not list((tmp_path / "vae").glob(".*"))


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    """A converted model, a pipeline, a tokenizer."""
    busy = pytest.raises(UserError, match=rf"out: is in use by process {os.getpid()}")
    with WriterLock(tmp_path / ".out.lock", "out"), busy:
        write_folder(tmp_path / "out", False, lambda folder: (folder / "a").touch())
    write_folder(tmp_path / "out", False, lambda folder: (folder / "a").touch())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    shutil.rmtree(tmp_path / "out")
