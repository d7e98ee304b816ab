"""Boards are those that the flags ask for, as far as they are installed."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from uvit.errors import UserError
from uvit.train.metrics import TensorBoard, check_trackers, has_wandb, open_trackers
from uvit.train.trainer import train


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        ({"report_to": "none"}, 0),
        ({"report_to": "tensorboard"}, 1),
        ({"report_to": "tensorboard", "enable_tensorboard": False}, 0),
    ],
)
def test_which_boards_there_are(flags: dict[str, Any], number: int, tiny_config: Any, tmp_path: Path) -> None:
    boards = open_trackers(tiny_config(**flags), tmp_path, tmp_path / "logs", 0)
    assert [type(board) for board in boards] == [TensorBoard] * number
    for board in boards:
        board.close()


@pytest.mark.skipif(has_wandb(), reason="Weights & Biases is installed")
def test_without_weights_and_biases(tiny_config: Any, tmp_path: Path) -> None:
    for flags in ({}, {"dry_run": True}):
        with pytest.raises(UserError, match=r"^--report_to wandb: .* pip install wandb$"):
            train(tiny_config(report_to="wandb", **flags))
    assert not (tmp_path / "run").exists()
    check_trackers(tiny_config(report_to="all"))
    [board] = open_trackers(tiny_config(report_to="all"), tmp_path, tmp_path / "logs", 0)
    assert isinstance(board, TensorBoard)
    board.close()


def test_weights_and_biases_without_a_network(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logs = tmp_path / "logs"
    logs.mkdir()
    boards = open_trackers(tiny_config(report_to="all"), tmp_path / "run", logs, 5)
    assert len(boards) == 2
    for board in boards:
        board.scalars({"train/loss": 0.5}, 6)
        board.image("preview", Image.new("RGB", (8, 8)), 6)
        board.close()
    [written] = logs.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"run from step 5" in content and b"learning_rate" in content
    assert list(logs.glob("wandb/offline-run-*/files/media/images/preview*.png"))
    summary = list(logs.glob("wandb/offline-run-*/files/wandb-summary.json"))
    assert not summary or json.loads(summary[0].read_text())["train/loss"] == 0.5
