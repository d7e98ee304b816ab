"""metrics.jsonl has each step once, whatever happened; throughput and time left are what they say."""

import json
from pathlib import Path
from typing import Any

import pytest

from uvit.errors import UserError
from uvit.train.metrics import Metrics, keep_lines


def record(step: int, loss: float | None = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": loss, "lr": 1e-3, "skipped": int(loss is None), "seconds": 0.5}


def test_lines_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    assert len(keep_lines(path, 5)) == 5
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert keep_lines(tmp_path / "none.jsonl", 5) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("what\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1"):
        keep_lines(path, 5)


def test_console_and_board(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tiny_config(report_to="tensorboard", benchmark=True), tmp_path, 0, 10, samples_per_step=8)
    for step, loss in enumerate([1.0, 2.0, 3.0, None], start=1):
        metrics.step(record(step, loss))
    metrics.close()
    said = capsys.readouterr().out.splitlines()
    assert "step 2/10: loss 1.5000" in said[0] and "16.0 samples/s, 0:00:04 left" in said[0]
    assert "loss 3.0000" in said[1] and said[1].split(", ")[-2] == "1 skipped"
    assert "16.0 samples/s, 500.0 ms a step" in metrics.throughput()
    assert list((tmp_path / "logs").glob("events.*"))
