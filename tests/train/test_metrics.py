"""metrics.jsonl has each step once, whatever happened; throughput, waiting and time left are what they say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import TIMING_FIELDS
from uvit.errors import UserError
from uvit.train.metrics import PART_SECONDS, Metrics, data_hints, truncate_log
from uvit.train.profiling import MfuReference
from uvit.train.validate import TIMESTEPS

WORK = MfuReference(flops=10, peak=40.0, sentence="")  # half of what can be done in half a second


def record(step: int, loss: float | None = 1.0, data_seconds: float = 0.0) -> dict[str, Any]:
    values = {"step": step, "loss": loss, "grad_norm": loss, "lr": 1e-3, "skipped": int(loss is None), "seconds": 0.5}
    parts = dict.fromkeys(PART_SECONDS, 0.1) | {"data_seconds": data_seconds}
    return values | parts | {"peak_memory_bytes": 2**30}


def test_lines_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    assert len(truncate_log(path, 5, 10)) == 5
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert truncate_log(tmp_path / "none.jsonl", 5, 10) == []


def test_the_next_mean_is_that_of_a_run_never_stopped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    losses = [1.0, 2.0, 3.0, None, 5.0]
    path.write_text("".join(json.dumps(record(step, loss)) + "\n" for step, loss in enumerate(losses, 1)))
    assert truncate_log(path, 5, 3) == [5.0]
    assert truncate_log(path, 3, 3) == []
    assert truncate_log(path, 3, 2) == [3.0]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("what\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1"):
        truncate_log(path, 5, 10)


def test_console_and_board(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tiny_config(report_to="tensorboard", benchmark=True), tmp_path, 0, 10, 8, WORK)
    for step, loss in enumerate([1.0, 2.0, 3.0, None], start=1):
        metrics.step(record(step, loss))
    metrics.close()
    said = capsys.readouterr().out.splitlines()
    assert "step 2/10: loss 1.5000" in said[0] and "16.0 samples/s, 50% MFU, 0:00:04 left" in said[0]
    assert "loss 3.0000" in said[1] and said[1].split(", ")[-2] == "1 skipped"
    assert "16.0 samples/s, 500.0 ms a step" in metrics.throughput() and "0% waiting for data" in metrics.throughput()
    assert "waiting" not in "".join(said)
    assert "50.0% MFU" in metrics.throughput()
    shown = points(tmp_path / "logs")
    assert shown["train/forward_seconds"] == [(2, pytest.approx(0.1)), (4, pytest.approx(0.1))]
    assert shown["train/mfu"][0] == (2, 0.5) and shown["train/peak_memory_gib"][0] == (2, 1.0)
    assert shown["train/skipped"] == [(2, 0), (4, 1)]


def test_a_line_has_what_was_measured_under_names_that_say_so(tiny_config: Any, tmp_path: Path) -> None:
    metrics = Metrics(tiny_config(), tmp_path, 0, 10, 8, WORK)
    metrics.step(record(1))
    metrics.close()
    line = json.loads((tmp_path / "logs" / "metrics.jsonl").read_text())
    assert set(TIMING_FIELDS) - {"evaluation_seconds"} <= line.keys()
    assert line["mfu"] == 0.5 and line["samples_per_second"] == 16
    assert line.keys() - set(TIMING_FIELDS) == {"step", "loss", "grad_norm", "lr", "skipped"}


def test_an_unknown_peak_shows_no_utilisation(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(
        tiny_config(report_to="tensorboard", benchmark=True), tmp_path, 0, 10, 8, MfuReference(10, None, "")
    )
    metrics.step(record(1))
    metrics.step(record(2))
    metrics.close()
    assert "MFU" not in capsys.readouterr().out + metrics.throughput()
    assert "train/mfu" not in points(tmp_path / "logs")
    assert json.loads((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[0])["mfu"] is None


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_validation_is_told_everywhere(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tiny_config(report_to="tensorboard"), tmp_path, 0, 10, 8, WORK)
    losses = [i / 10 for i in range(8)]
    metrics.step(record(1) | {"val_loss": 0.35, "val_loss_raw": 0.5, "val_losses": losses})
    metrics.step(record(2))
    metrics.step(record(3) | {"val_loss": None, "val_loss_raw": None, "val_losses": [None] * 8})
    metrics.close()
    assert ", val 0.3500 at step 1" in capsys.readouterr().out
    path = tmp_path / "logs" / "metrics.jsonl"
    assert json.loads(path.read_text().splitlines()[0])["val_losses"] == losses
    shown = points(tmp_path / "logs")
    assert shown["val/loss"] == [(1, pytest.approx(0.35))] and shown["val/loss_raw"] == [(1, pytest.approx(0.5))]
    for label, loss in zip(TIMESTEPS, losses, strict=True):
        assert shown[f"val/loss_t{label}"] == [(1, pytest.approx(loss))]
    assert len(truncate_log(path, 2, 10)) == 2
    assert '"val_loss": 0.35' in path.read_text()


def test_waiting_is_shown_and_much_of_it_warned_of_once(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows of two steps that wait for 40%, 4%, 10%, 30% and 50% of the time; the first may, the workers start."""
    config = tiny_config(report_to="tensorboard", benchmark=True)
    metrics = Metrics(config, tmp_path, 0, 10, 8, WORK)
    shares = [0.4, 0.04, 0.1, 0.3, 0.5]
    for window, share in enumerate(shares):
        metrics.step(record(2 * window + 1, data_seconds=share))  # seconds: 0.5 a step, so a window takes 1
        metrics.step(record(2 * window + 2))
    metrics.close()
    said = capsys.readouterr().out.splitlines()
    assert [f"{share:.0%} waiting for data" in line for share, line in zip(shares[:3], said[:3], strict=True)] == [
        True,
        False,
        True,
    ]
    assert "30% waiting for data" in said[3] and "--dataloader_num_workers" not in "".join(said[:4])
    assert said[4].startswith("30% of the last steps") and "features on a local disk" in said[4]
    assert "50% waiting for data" in said[5] and len(said) == 6
    assert points(tmp_path / "logs")["train/data_share"] == [
        (2 * window + 2, pytest.approx(share)) for window, share in enumerate(shares)
    ]
    assert "21% waiting for data" in metrics.throughput()  # 0.94 of 4.5 s: the first tenth, a step, is left out


def test_advice_is_what_can_be_done(tiny_config: Any) -> None:
    cores = os.cpu_count()
    assert f"more --dataloader_num_workers (now 0 of {cores} cores)" in data_hints(tiny_config(), npy_features=False)
    assert "num_workers" not in data_hints(tiny_config(dataloader_num_workers=1024), npy_features=False)
    assert "uvit features import" not in data_hints(tiny_config(), npy_features=False)
    assert "uvit features import" in data_hints(tiny_config(), npy_features=True)
