"""What the page shows of a training run, from the run's own files: it may be running, or have ended long ago."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from uvit.checkpoint.folder import read_best
from uvit.lock import LOCK, current_writer
from uvit.serve.models import ServedModel
from uvit.serve.requests import RequestError

MAX_ROWS = 2000
MAX_LISTED = 200  # skipped steps and samples in an answer


class MetricsLog:
    """The rows of a metrics.jsonl that grows, thinned to MAX_ROWS.

    Only what was added is read. Rows with a validation, and of skipped steps, are thinned last.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock = threading.Lock()
        self._reset(None)

    def _reset(self, inode: int | None) -> None:
        self.inode, self.offset, self.stride = inode, 0, 1
        self.kept: list[dict[str, Any]] = []
        self.last: dict[str, Any] | None = None

    def rows(self, after: int = -1) -> list[dict[str, Any]]:
        with self.lock:
            self._read()
            last = [self.last] if self.last is not None and self.last not in self.kept[-1:] else []
            return [row for row in [*self.kept, *last] if row["step"] > after]

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.inode or status.st_size < self.offset:  # a resumed run writes it anew
                    self._reset(status.st_ino)
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    self.offset += len(line)
                    self._add(line)
        except OSError:
            self._reset(None)

    def _add(self, line: bytes) -> None:
        with suppress(ValueError):
            row = json.loads(line, parse_constant=lambda _: None)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                return
            self.last = row
            if row["step"] % self.stride == 0 or is_notable(row):
                self.kept.append(row)
        if len(self.kept) >= MAX_ROWS:
            self.stride *= 2
            self.kept = [row for row in self.kept if row["step"] % self.stride == 0 or is_notable(row)]
            if len(self.kept) > MAX_ROWS // 2:  # nearly all are notable
                self.kept = self.kept[::2]


def is_notable(row: dict[str, Any]) -> bool:
    return "val_loss" in row or "evaluation_seconds" in row or bool(row.get("skipped"))


class ServedRun:
    """A training run's folder."""

    def __init__(self, model: ServedModel):
        self.model = model
        settings = self.settings()
        self.logs = Path(settings.get("logging_dir") or model.folder / "logs")
        self.metrics = MetricsLog(self.logs / "metrics.jsonl")

    def settings(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, yaml.YAMLError):
            found = yaml.safe_load((self.model.folder / "config.yaml").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def describe(self) -> dict[str, Any]:
        rows, settings = self.metrics.rows(), self.settings()
        return {
            "name": self.model.name,
            "step": rows[-1]["step"] if rows else 0,
            "max_steps": None if settings.get("num_train_epochs") else settings.get("max_steps"),
            "running": current_writer(self.model.folder / LOCK) is not None,
            "checkpoints": self.model.checkpoints(),
            "best": read_best(self.model.folder),
        }

    def checkpoints(self) -> list[dict[str, Any]]:
        best = (read_best(self.model.folder) or {}).get("step")
        return [
            {"step": step, "model": f"{self.model.name}@checkpoint-{step}", "best": step == best}
            for step in self.model.checkpoints()
        ]

    def previews(self) -> dict[int, Path]:
        found = {}
        for path in (self.model.folder / "previews").glob("step-*.png"):
            with suppress(ValueError):
                found[int(path.stem.removeprefix("step-"))] = path
        return dict(sorted(found.items()))

    def skipped(self) -> dict[str, Any]:
        """Steps that updated nothing, and samples that are skipped after a rollback."""
        steps = [row for row in self.metrics.rows() if row.get("skipped")]
        samples = list(self._skipped_samples())
        return {
            "steps": [
                {"step": row["step"], "grad_norm": row.get("grad_norm"), "reason": skip_reason(row)}
                for row in steps[-MAX_LISTED:]
            ],
            "num_samples": len(samples),
            "samples": samples[:MAX_LISTED],
        }

    def _skipped_samples(self) -> Iterator[dict[str, Any]]:
        with suppress(OSError):
            for line in (self.logs / "passed_over.jsonl").read_bytes().splitlines():
                with suppress(ValueError):
                    yield json.loads(line)


def skip_reason(row: dict[str, Any]) -> str:
    """Why a step updated nothing."""
    if row.get("loss") is None or row.get("grad_norm") is None:
        return "the loss or the gradient was NaN or infinite"
    return "the gradient was far larger than usual (--spike_factor)"


def run_routes(models: dict[str, ServedModel]) -> APIRouter:
    """The routes below /v1/runs. They read files, so they run in threads."""
    router = APIRouter(prefix="/v1/runs")
    runs: dict[str, ServedRun] = {}

    def find(name: str) -> ServedRun:
        if name not in models or not models[name].is_run:
            known = ", ".join(each for each in models if models[each].is_run) or "none"
            raise RequestError(f"run {name}: there is no such run; the runs are {known}", 404, "name", "not_found")
        return runs.setdefault(name, ServedRun(models[name]))

    @router.get("")
    def list_runs() -> list[dict[str, Any]]:
        return [find(name).describe() for name, model in models.items() if model.is_run]

    @router.get("/{name}/metrics")
    def metrics(name: str, after: int = -1) -> dict[str, Any]:
        return {"rows": find(name).metrics.rows(after)}

    @router.get("/{name}/checkpoints")
    def checkpoints(name: str) -> list[dict[str, Any]]:
        return find(name).checkpoints()

    @router.get("/{name}/skipped")
    def skipped(name: str) -> dict[str, Any]:
        return find(name).skipped()

    @router.get("/{name}/previews")
    def previews(name: str) -> list[dict[str, Any]]:
        return [{"step": step, "url": f"/v1/runs/{name}/previews/{step}.png"} for step in find(name).previews()]

    @router.get("/{name}/previews/{step}.png")
    def preview_image(name: str, step: int) -> Response:
        path = find(name).previews().get(step)
        if path is None:
            raise RequestError(f"run {name}: has no preview of step {step}", 404, "step", "not_found")
        return FileResponse(path, media_type="image/png")

    return router
