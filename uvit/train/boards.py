"""Where curves and previews are shown besides the console: TensorBoard, Weights & Biases."""

import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from uvit.config.train import TrainConfig
from uvit.errors import UserError


class Board(Protocol):
    def scalars(self, points: dict[str, float], step: int) -> None:
        """{`train/loss`: ..., ...}"""
        ...

    def image(self, name: str, image: Image.Image, step: int) -> None: ...

    def close(self) -> None: ...


def open_boards(config: TrainConfig, output_dir: Path, folder: Path, first_step: int) -> list[Board]:
    """Those that the flags ask for, from step `first_step` on; `folder` is that of the logs."""
    boards: list[Board] = []
    if config.enable_tensorboard and config.report_to in ("tensorboard", "all"):
        boards.append(TensorBoard(folder, first_step))
    if config.report_to == "wandb" or (config.report_to == "all" and has_wandb()):
        boards.append(WeightsAndBiases(config, output_dir, folder, first_step))
    return boards


def has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def check_boards(config: TrainConfig) -> None:
    """Raises UserError where Weights & Biases is asked for by name and not installed."""
    if config.report_to == "wandb" and not has_wandb():
        raise UserError("--report_to wandb: Weights & Biases is not installed; pip install wandb")


class TensorBoard:
    """A run that goes on takes back what it showed after its checkpoint."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, points: dict[str, float], step: int) -> None:
        for name, value in points.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project $WANDB_PROJECT, or else `uvit`, for each time that training starts or goes on."""

    def __init__(self, config: TrainConfig, output_dir: Path, folder: Path, first_step: int):
        import wandb

        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "uvit"),
            group=output_dir.name,
            name=f"{output_dir.name} from step {first_step}" if first_step else output_dir.name,
            dir=str(folder),
            config=asdict(config),
        )
        self.run.define_metric("*", step_metric="step")

    def scalars(self, points: dict[str, float], step: int) -> None:
        self.run.log({**points, "step": step})

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(image), "step": step})

    def close(self) -> None:
        self.run.finish()
