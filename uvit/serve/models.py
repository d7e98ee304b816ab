"""Which models there are, by name. A name in a request is looked up here; it never becomes a path.

This module needs no torch: the process that answers requests does not compute.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from uvit.checkpoint.folder import checkpoint_folders, latest_complete, newer_checkpoint, step_of
from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.requests import ModelRef, RequestError

PIPELINE_INDEX = "model_index.json"


@dataclass(frozen=True)
class ServedModel:
    """A pipeline folder, or a training run, which may still be running."""

    name: str
    folder: Path

    @property
    def is_run(self) -> bool:
        return (self.folder / "config.yaml").is_file() or bool(checkpoint_folders(self.folder))

    @property
    def has_weights(self) -> bool:
        """Whether there is a pipeline or a checkpoint: not yet, where a run has just begun."""
        return any((f / PIPELINE_INDEX).is_file() for f in self.pipelines()) or bool(checkpoint_folders(self.folder))

    def pipelines(self) -> tuple[Path, Path]:
        """Where a pipeline may lie."""
        return self.folder, self.folder / "pipeline"

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that can be sampled from, rising."""
        return [step for folder in checkpoint_folders(self.folder) if (step := step_of(folder)) is not None]

    def ref(self) -> ModelRef:
        """The pipeline, or of a run that has none or has trained on, the latest checkpoint.

        Raises RequestError if there is neither.
        """
        for folder in self.pipelines():
            has_trained_on = folder != self.folder and newer_checkpoint(folder)
            if (folder / PIPELINE_INDEX).is_file() and not has_trained_on:
                return make_ref(self.name, folder, False)
        if found := latest_complete(self.folder):
            return make_ref(f"{self.name}@{found.name}", found, True)
        raise RequestError(f"--model {self.name}: the run has no checkpoint yet; try again later", 409, "model")

    def checkpoint_ref(self, name: str) -> ModelRef:
        for folder in checkpoint_folders(self.folder):
            if folder.name == name:
                return make_ref(f"{self.name}@{name}", folder, True)
        steps = ", ".join(map(str, self.checkpoints())) or "none"
        raise unknown_model(f"{self.name}@{name}", f"the checkpoints of {self.name} are {steps}")


def list_models(config: ServeConfig) -> dict[str, ServedModel]:
    """{name: model}, in the order of the command line. Raises UserError if a folder is neither pipeline nor run."""
    models = {}
    for name, path in config.named_models():
        model = ServedModel(name, Path(path))
        if not model.folder.is_dir():
            raise UserError(f"--models {path}: there is no such folder; give a run's or a pipeline's")
        if not model.is_run and not model.has_weights:
            raise UserError(
                f"--models {path}: is neither a training run nor a pipeline folder; `uvit convert` makes a pipeline"
            )
        models[name] = model
    return models


def find_model(models: dict[str, ServedModel], id: str | None) -> ModelRef:
    """The model of a request; None is the first. Raises RequestError if there is no such model."""
    name, at, checkpoint = (next(iter(models)) if id is None else id).partition("@")
    if name not in models:
        raise unknown_model(str(id), f"the models are {', '.join(models)}")
    return models[name].checkpoint_ref(checkpoint) if at else models[name].ref()


def unknown_model(id: str, known: str) -> RequestError:
    return RequestError(f"--model {id}: there is no such model; {known}", 404, "model", "model_not_found")


def make_ref(id: str, folder: Path, is_checkpoint: bool) -> ModelRef:
    version = []
    with contextlib.suppress(OSError, ValueError, TypeError):  # the worker that opens it says what is wrong
        for path in files_of(folder, is_checkpoint):
            status = path.stat()
            version.append((status.st_mtime_ns, status.st_size))
    return ModelRef(id, str(folder), is_checkpoint, tuple(version))


def files_of(folder: Path, is_checkpoint: bool) -> list[Path]:
    """The files of a checkpoint; of a pipeline, its index and those of the components that it names."""
    if is_checkpoint:
        return sorted(folder.iterdir())
    index = json.loads((folder / PIPELINE_INDEX).read_bytes())
    parts = [folder / name for name in index if (folder / name).is_dir()]
    return [folder / PIPELINE_INDEX, *(path for part in parts for path in sorted(part.iterdir()))]
