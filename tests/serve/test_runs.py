"""A training run, as the page sees it."""

import json
import shutil
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.serve.conftest import OLD
from uvit.checkpoint.folder import checkpoint_folders, step_of, training_facts
from uvit.lock import LOCK, WriterLock
from uvit.serve.models import ServedModel
from uvit.serve.requests import RequestError
from uvit.serve.runs import MAX_ROWS, MetricsLog, run_routes


def write(path: Path, steps: range, **more: Any) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": 1 / (1 + step), **more}) + "\n" for step in steps)


def test_rows_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    assert log.rows() == []
    write(path, range(1, 4))
    assert [row["step"] for row in log.rows()] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a line that is being written
    assert [row["step"] for row in log.rows(after=1)] == [2, 3]
    with path.open("a") as file:
        file.write('ss": NaN}\nno JSON\n')
    assert log.rows(after=3) == [{"step": 4, "loss": None}]
    path.write_text('{"step": 1, "loss": 5.0}\n')  # a resumed run has cut it
    assert log.rows() == [{"step": 1, "loss": 5.0}]


def test_a_long_log_is_thinned_and_keeps_what_is_rare(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5000))
    write(path, range(5000, 5001), val_loss=0.5)
    write(path, range(5001, 7001))
    write(path, range(7001, 7002), eval_fd=99.0, evaluation_seconds=1.0)
    write(path, range(7002, 10_004))
    rows = MetricsLog(path).rows()
    assert MAX_ROWS / 4 < len(rows) <= MAX_ROWS + 1
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 10_003 and {5000, 7001} <= set(steps)


def test_a_run_that_has_trained_on_serves_its_latest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    (finished,) = (folder for folder in checkpoint_folders(run) if step_of(folder) == 4)
    assert training_facts(run / "pipeline")["step"] == 4
    assert ServedModel("run", run).ref().path == str(run / "pipeline")
    finished.rename(run / "checkpoint-6")
    assert ServedModel("run", run).ref().id == "run@checkpoint-6"
    assert ServedModel("run", run / "pipeline").ref().path == str(run / "pipeline")  # as it was asked for
    (run / "checkpoint-6" / "ema.safetensors").unlink()
    assert ServedModel("run", run).ref().path == str(run / "pipeline")  # the only whole one of this step or later


def test_the_routes(run_folder: Path, tmp_path: Path) -> None:
    app = FastAPI()
    app.include_router(run_routes({"run": ServedModel("run", run_folder), "none": ServedModel("none", tmp_path)}))
    client = TestClient(app)
    (run,) = client.get("/v1/runs").json()
    assert (run["name"], run["step"], run["max_steps"], run["running"]) == ("run", 4, 4, False)
    settings = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(f"{settings}num_train_epochs: 2.0\n")
    assert client.get("/v1/runs").json()[0]["max_steps"] is None  # it is not used
    (run_folder / "config.yaml").write_text(settings)
    with WriterLock(run_folder / LOCK, "run"):
        assert client.get("/v1/runs").json()[0]["running"] is True
    rows = client.get("/v1/runs/run/metrics", params={"after": 2}).json()["rows"]
    assert [row["step"] for row in rows] == [3, 4]
    assert [c["model"] for c in client.get("/v1/runs/run/checkpoints").json()] == [
        "run@checkpoint-2",
        "run@checkpoint-4",
    ]
    previews = run_folder / "previews"
    previews.mkdir(exist_ok=True)
    for step in (4, 2):
        (previews / f"step-{step:08d}.png").write_bytes(b"png")
    found = client.get("/v1/runs/run/previews").json()
    assert [preview["step"] for preview in found] == [2, 4]
    assert client.get(found[0]["url"]).content == b"png"
    write(run_folder / "logs" / "metrics.jsonl", range(5, 6), skipped=1, grad_norm=None)
    write(run_folder / "logs" / "metrics.jsonl", range(6, 7), skipped=1, grad_norm=1e9)
    (run_folder / "logs" / "passed_over.jsonl").write_text('{"sample": 7, "id": "\u2028"}\n')
    skipped = client.get("/v1/runs/run/skipped").json()
    assert [step["step"] for step in skipped["steps"]] == [5, 6]
    assert "NaN" in skipped["steps"][0]["reason"] and "--spike_factor" in skipped["steps"][1]["reason"]
    assert skipped["samples"] == [{"sample": 7, "id": "\u2028"}]
    for path in ("/v1/runs/none/metrics", "/v1/runs/run/previews/3.png"):
        try:
            client.get(path)
        except RequestError as error:
            assert error.status == 404
        else:
            raise AssertionError(path)
