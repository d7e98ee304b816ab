"""Going back to an earlier checkpoint: what came after it is set aside, and the command can be repeated."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import contents
from tests.train.test_trainer import lines, same
from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.errors import UserError
from uvit.train.branch import ASIDE
from uvit.train.trainer import train


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(run)]


def killed_at(call: Callable[[], Any], fatal: int, folder: Path) -> bool:
    """Run it in a forked process, with SIGKILL before the `fatal`-th name in `folder` changes. -> was it killed?"""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    import sys

    count = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("os.rename", "os.link", "os.mkdir") and str(values[-2 if event == "os.mkdir" else 0]).startswith(
            str(folder)
        ):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        sys.addaudithook(hook)
        call()
        status = 0
    finally:
        os._exit(status)


@pytest.fixture
def config(tiny_config: Any, tmp_path: Path) -> Any:
    """A function: flags -> the config of a run with previews and TensorBoard that saves every other step."""
    flags = {"save_steps": 2, "image_logging_steps": 2, "num_inference_steps": 1, "report_to": "tensorboard"}
    return lambda **more: tiny_config(**(flags | more))


def test_what_came_after_is_set_aside_and_the_new_branch_goes_on(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config())
    before = contents(run, 6)
    back = config(resume_from_checkpoint=str(run / "checkpoint-2") + "/", learning_rate=3e-3)
    train(back)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert f"what a later branch left is now in {run / 'set-aside-1'}" in capsys.readouterr().out
    moved = {path.relative_to(run / "set-aside-1").as_posix() for path in (run / "set-aside-1").rglob("*")}
    assert {"checkpoint-4", "checkpoint-6", "pipeline", "config.yaml", "logs/metrics.jsonl"} < moved
    assert {path for path in moved if path.endswith(".png") and "step" in path} == {
        "previews/step-00000004.png",
        "previews/step-00000006.png",
    }
    aside = {
        name: (run / "set-aside-1" / name).read_bytes() for name in before if (run / "set-aside-1" / name).exists()
    }
    del aside["logs/metrics.jsonl"]
    assert all(before[name] == content for name, content in aside.items())
    assert len((run / "set-aside-1" / "logs" / "metrics.jsonl").read_text().splitlines()) == 6
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert lines(run)[:2] == [{**line} for line in lines(run / "set-aside-1")[:2]]
    assert lines(run)[5] != lines(run / "set-aside-1")[5]
    assert not same(run / "checkpoint-6", run / "set-aside-1" / "checkpoint-6")
    # The same command resumes the branch, here at its end.
    train(back)
    assert "this command has gone back to it before, and resumes at checkpoint-6" in capsys.readouterr().out
    assert not (run / "set-aside-2").exists()
    # Another command goes back again.
    train(config(resume_from_checkpoint=str(run / "checkpoint-2"), learning_rate=4e-3))
    assert names(run / "set-aside-2") == ["checkpoint-4", "checkpoint-6"]
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # Without the flag, the latest is resumed as ever.
    train(config(max_steps=7, learning_rate=4e-3))
    assert names(run)[-1] == "checkpoint-7" and not (run / "set-aside-3").exists()
    assert not list(run.glob(".*"))


def test_killed_at_any_moment_and_repeated_it_is_the_same_branch(tiny_config: Any, tmp_path: Path) -> None:
    """Neither is the new work thrown away nor the old."""
    flags = {"save_steps": 2, "learning_rate": 3e-3}
    train(tiny_config(output_dir=str(tmp_path / "first"), save_steps=2))

    def branch(run: Path) -> int:
        return train(tiny_config(output_dir=str(run), resume_from_checkpoint=str(run / "checkpoint-2"), **flags))

    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    branch(tmp_path / "whole")
    whole = contents(tmp_path / "whole", 6)
    fatal, killed = 0, True
    while killed:  # at every second call; the test of checkpoints kills at each
        fatal += 2
        run = tmp_path / f"killed-{fatal}"
        shutil.copytree(tmp_path / "first", run)
        killed = killed_at(lambda run=run: branch(run), fatal, run)  # type: ignore[misc]
        steps = [read_checkpoint(folder).step for folder in checkpoint_folders(run)]
        branch(run)
        found = contents(run, 6)
        different = {name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)}
        # These name the folder of the run.
        assert {Path(name).name for name in different} <= {
            "uvit.json",
            "config.yaml",
            "training.json",
            "README.md",
        }
        assert same(run / "checkpoint-6", tmp_path / "whole" / "checkpoint-6"), fatal
        assert lines(run) == lines(tmp_path / "whole"), fatal
        assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and steps[0] == 2
        shutil.rmtree(run)
    assert fatal > 15


def test_a_kill_after_the_first_checkpoint_of_the_branch_costs_none_of_it(tiny_config: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(save_steps=2))
    back = {"resume_from_checkpoint": str(run / "checkpoint-2"), "save_steps": 1}
    train(tiny_config(**back))
    shutil.rmtree(run / "checkpoint-6")  # as a kill would leave it
    inode = (run / "checkpoint-5" / "weights.safetensors").stat().st_ino
    train(tiny_config(**back))
    assert (run / "checkpoint-5" / "weights.safetensors").stat().st_ino == inode
    assert not (run / "set-aside-2").exists()
    # A damaged one is skipped, for the one before it.
    with (run / "checkpoint-6" / "ema.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    train(tiny_config(**back))
    assert (run / "checkpoint-5" / "weights.safetensors").stat().st_ino == inode
    assert read_checkpoint(run / "checkpoint-6").verify() is None
    assert not (run / "set-aside-2").exists()


def test_a_branch_goes_on_after_the_other_run_has_deleted_its_beginning(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(save_steps=2))
    for number, name in enumerate((str(tmp_path / "run" / "checkpoint-4"), "checkpoint-2")):
        flags = {"resume_from_checkpoint": name, "save_steps": 1}
        output_dir = str(tmp_path / "other") if number == 0 else str(tmp_path / "run")
        train(tiny_config(output_dir=output_dir, **flags))
        shutil.rmtree(tmp_path / "run" / Path(name).name)
        shutil.rmtree(Path(output_dir) / "checkpoint-6")
        train(tiny_config(output_dir=output_dir, **flags))
        assert read_checkpoint(Path(output_dir) / "checkpoint-6").step == 6


def test_a_pipeline_of_another_branch_is_not_taken_for_this_one(tiny_config: Any, tmp_path: Path) -> None:
    """Somebody has deleted the checkpoints after it."""
    run = tmp_path / "run"
    train(tiny_config())
    before = (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for flags in ({"learning_rate": 3e-3}, {"learning_rate": 4e-3, "resume_from_checkpoint": "checkpoint-3"}):
        shutil.rmtree(run / "checkpoint-6")
        train(tiny_config(**flags))
        after = (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        assert after != before
        before = after
    assert (run / "pipeline.old1").exists() and (run / "set-aside-1" / "pipeline").exists()


def test_the_limit_spares_where_the_branch_began(tiny_config: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(save_steps=2))
    train(tiny_config(resume_from_checkpoint="checkpoint-2", save_steps=1, save_total_limit=1))
    assert names(run) == ["checkpoint-2", "checkpoint-6"]
    train(tiny_config(save_steps=1, save_total_limit=1, max_steps=8))  # nor does a plain command delete it
    assert names(run) == ["checkpoint-2", "checkpoint-8"]
    train(tiny_config(resume_from_checkpoint="checkpoint-2", save_steps=1, save_total_limit=1, max_steps=4))
    assert names(run) == ["checkpoint-2", "checkpoint-4"]
    assert names(run / "set-aside-2") == ["checkpoint-8"]


def test_a_checkpoint_of_another_run_begins_a_branch_here(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(save_steps=2))
    before = contents(tmp_path / "run", 6)
    train(tiny_config(output_dir=str(tmp_path / "other"), seed=5, save_steps=3))
    monkeypatch.chdir(tmp_path / "run")
    flags = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": "checkpoint-4", "save_steps": 1}
    train(tiny_config(**flags))
    other = tmp_path / "other"
    assert names(other) == ["checkpoint-5", "checkpoint-6"]
    assert names(other / "set-aside-1") == ["checkpoint-3", "checkpoint-6"]
    assert [line["step"] for line in lines(other)] == [5, 6]
    assert [line["step"] for line in lines(other / "set-aside-1")] == [1, 2, 3, 4, 5, 6]
    assert contents(tmp_path / "run", 6) == before
    shutil.rmtree(other / "checkpoint-6")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    train(tiny_config(**flags | {"resume_from_checkpoint": "link/checkpoint-4"}))  # the same one
    assert not (other / "set-aside-2").exists() and names(other) == ["checkpoint-5", "checkpoint-6"]
    # A run that has all its steps already has nothing to save, and a pipeline all the same.
    new = tmp_path / "new"
    train(tiny_config(output_dir=str(new), resume_from_checkpoint="run/checkpoint-6"))
    assert (new / "pipeline").is_dir() and names(new) == []


def test_a_checkpoint_that_will_not_do_is_a_sentence_and_moves_nothing(tiny_config: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(save_steps=2, prediction_type="sample"))
    (run / "checkpoint-4" / "ema.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, message in {
        str(run / "checkpoint-4"): "checkpoint-4: is not complete, ema.safetensors is missing",
        str(run / "checkpoint-5"): "there is no such checkpoint",
        str(run): "is a run folder: name one of its checkpoints, such as .*checkpoint-6",
        str(tmp_path / "empty"): "is not a checkpoint",
        str(tmp_path / "file"): "there is no such checkpoint",
        str(run / "checkpoint-2"): "prediction_type: was sample, now epsilon",
    }.items():
        with pytest.raises(UserError, match=message):
            train(tiny_config(save_steps=2, resume_from_checkpoint=name))
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not list(run.glob("set-aside-*")) and not (run / ASIDE).exists()


def test_where_no_checkpoint_is_whole_nothing_begins_again(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config())
    for folder in checkpoint_folders(tmp_path / "run"):
        (folder / "uvit.json").write_text("")
    with pytest.raises(UserError, match=r"has 2 checkpoints and none is whole .*--overwrite_output_dir"):
        train(tiny_config())
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"] and len(lines(tmp_path / "run")) == 6
    train(tiny_config(overwrite_output_dir=True))
    assert names(tmp_path / "run.old1") == ["checkpoint-3", "checkpoint-6"]
