"""The best checkpoint is kept, whatever is pruned, and is the best of the branch that the run is on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_trainer import lines
from uvit.checkpoint.folder import checkpoint_folders
from uvit.cli.main import main
from uvit.train.trainer import train


def best(run: Path) -> dict[str, Any]:
    return json.loads((run / "best.json").read_text())


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(run)]


@pytest.fixture
def worsening(evaluated_config: Any) -> Any:
    """Its validation loss is the best after step 2, where no checkpoint is due; then it learns too fast."""
    flags = {
        "keep_best": "val_loss", "eval_metrics": (), "save_steps": 3, "save_total_limit": 1, "max_steps": 8,
        "learning_rate": 1.0, "warmup_steps": 20, "use_ema": False,
    }  # fmt: skip
    return lambda **more: evaluated_config(**(flags | more))


def test_the_best_checkpoint_survives_pruning(
    worsening: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(worsening()) == 0
    losses = {line["step"]: line["val_loss"] for line in lines(run) if "val_loss" in line}
    assert min(losses, key=lambda step: losses[step]) == 2
    assert best(run) == {"metric": "val_loss", "value": losses[2], "step": 2, "checkpoint": "checkpoint-2"}
    assert names(run) == ["checkpoint-2", "checkpoint-8"]
    capsys.readouterr()
    assert main(["checkpoints", "list", str(run)]) == 0
    _, first, last = capsys.readouterr().out.splitlines()
    assert first.endswith(f"best val_loss: {losses[2]:.4g}") and "best" not in last
    assert train(worsening(output_dir=str(tmp_path / "other"), keep_best=None, save_total_limit=None)) == 0
    assert lines(run) == lines(tmp_path / "other")
    assert names(tmp_path / "other") == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


def test_a_best_one_that_is_surpassed_is_pruned(worsening: Any, tmp_path: Path) -> None:
    assert train(worsening(learning_rate=0.03)) == 0
    assert names(tmp_path / "run") == ["checkpoint-8"] and best(tmp_path / "run")["step"] == 8


def test_a_resumed_run_knows_the_best(worsening: Any, tmp_path: Path) -> None:
    """Even if it was killed before best.json was written; and a checkpoint that is gone is not the best one."""
    run = tmp_path / "run"
    assert train(worsening(max_steps=5)) == 0
    (run / "best.json").unlink()
    assert train(worsening()) == 0
    assert best(run)["step"] == 2 and names(run) == ["checkpoint-2", "checkpoint-8"]
    assert train(worsening(max_steps=9, keep_best=None)) == 0  # without the flag, nothing is forgotten
    assert best(run)["step"] == 2 and names(run) == ["checkpoint-2", "checkpoint-9"]
    shutil.rmtree(run / "checkpoint-2")
    assert train(worsening(max_steps=10)) == 0
    assert best(run)["step"] == 10 and names(run) == ["checkpoint-10"]


def test_another_metric_has_another_best(worsening: Any, tmp_path: Path) -> None:
    assert train(worsening(max_steps=4)) == 0
    assert train(worsening(max_steps=6, eval_metrics=("kid",), keep_best="kid")) == 0
    found = best(tmp_path / "run")
    assert found["metric"] == "eval_kid-tiny-vit" and found["step"] == 6
    assert found["value"] == lines(tmp_path / "run")[5]["eval_kid-tiny-vit"]


def test_going_back_sets_a_later_best_aside(worsening: Any, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", {"learning_rate": 0.03, "save_total_limit": None}
    assert train(worsening(**flags)) == 0
    assert names(run) == [f"checkpoint-{step}" for step in (2, 3, 4, 6, 8)]
    assert train(worsening(**flags, resume_from_checkpoint="checkpoint-3", keep_best=None, max_steps=5)) == 0
    assert best(run)["step"] == 2 and names(run) == [f"checkpoint-{step}" for step in (2, 3, 5)]
    assert best(run / "set-aside-1")["checkpoint"] == "checkpoint-8"
    assert (run / "set-aside-1" / "checkpoint-8").is_dir()


def test_a_rollback_keeps_the_best(worsening: Any, poisoned_store: Callable[..., str], tmp_path: Path) -> None:
    """Samples 16 to 23, those of steps 5 and 6, give NaN."""
    flags = {"feature_path": poisoned_store(*range(16, 24)), "max_nonfinite_steps": 2}
    assert train(worsening(**flags)) == 0
    assert best(tmp_path / "run")["step"] == 2 and names(tmp_path / "run") == ["checkpoint-2", "checkpoint-8"]
