"""What a run tells: a line a step in metrics.jsonl, points in TensorBoard, progress on the console."""

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from uvit.config.train import TrainConfig
from uvit.data.types import Batch
from uvit.errors import UserError
from uvit.train.validate import TIMESTEPS

SHARE_TO_SHOW, SHARE_TO_WARN = 0.05, 0.2  # of the time, spent waiting for data


class Metrics:
    """Records step after step; `close` ends it. A run that resumes goes on from the line of its checkpoint's step."""

    def __init__(
        self,
        config: TrainConfig,
        output_dir: Path,
        first_step: int,
        max_steps: int,
        samples_per_step: int,
        old_layout: bool = False,
    ):
        self.config, self.max_steps, self.samples_per_step = config, max_steps, samples_per_step
        folder = logs_folder(config, output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.window = keep_lines(folder / "metrics.jsonl", first_step)
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = None
        if config.enable_tensorboard and config.report_to != "none":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.progress = tqdm(
            total=max_steps, initial=first_step, unit="step", desc="train", disable=config.disable_tqdm, smoothing=0.05
        )
        self.recent: deque[float] = deque(maxlen=max(config.logging_steps, 2))
        self.times: list[tuple[float, float]] = []  # since the last line: (seconds, those spent waiting for data)
        self.all_times: list[tuple[float, float]] = []  # for --benchmark
        self.windows, self.warned = 0, False
        self.advice = advice(config, old_layout)
        self.validated = ""
        self.skipped = 0

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: step, samples, loss, grad_norm, lr, skipped, seconds, data_seconds, and a validation."""
        self.file.write(json.dumps(record) + "\n")
        self.recent.append(record["seconds"])
        self.skipped += record["skipped"]
        self.times.append((record["seconds"], record["data_seconds"]))
        if self.config.benchmark:
            self.all_times.append(self.times[-1])
        if "val_loss" in record:
            self._validation(record)
        if record["loss"] is not None:  # null: not finite, the update was skipped
            self.window.append(record["loss"])
        rate = self.samples_per_step * len(self.recent) / sum(self.recent)
        self.progress.update()
        if record["step"] % self.config.logging_steps and record["step"] != self.max_steps:
            return
        loss = float(np.mean(self.window[-self.config.logging_steps :])) if self.window else float("nan")
        grad_norm = float("nan") if record["grad_norm"] is None else record["grad_norm"]
        self.window.clear()
        line = f"loss {loss:.4f}, |grad| {grad_norm:.3g}, lr {record['lr']:.2e}, {rate:.1f} samples/s"
        if (waiting := share_of_waiting(self.times)) > SHARE_TO_SHOW:
            line += f", {waiting:.0%} waiting for data"
        line += self.validated
        if self.skipped:
            line += f", {self.skipped} skipped"
        self.progress.set_postfix_str(line, refresh=False)
        if self.config.disable_tqdm:
            left = (self.max_steps - record["step"]) * self.samples_per_step / rate
            print(f"step {record['step']}/{self.max_steps}: {line}, {_duration(left)} left", flush=True)
        if self.board is not None:
            points = {"loss": loss, "grad_norm": grad_norm, "lr": record["lr"], "samples_per_second": rate}
            points["data_share"] = waiting
            for name, value in points.items():
                self.board.add_scalar(f"train/{name}", value, record["step"])

        if waiting > SHARE_TO_WARN and self.windows and not self.warned:  # the first has the workers' start in it
            self.say(f"{waiting:.0%} of the last steps went into waiting for data; what helps: {self.advice}")
            self.warned = True
        self.windows += 1
        self.times.clear()

    def _validation(self, record: dict[str, Any]) -> None:
        if record["val_loss"] is not None:
            self.validated = f", val {record['val_loss']:.4f} at step {record['step']}"
        if self.board is None:
            return
        points = {"loss": record["val_loss"], "loss_raw": record["val_loss_raw"]}
        points |= {f"loss_t{label}": value for label, value in zip(TIMESTEPS, record["val_losses"], strict=True)}
        for name, value in points.items():
            if value is not None:
                self.board.add_scalar(f"val/{name}", value, record["step"])

    def image(self, name: str, image: Image.Image, step: int) -> None:
        if self.board is not None:
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def say(self, sentence: str) -> None:
        """A line that does not tear the progress bar."""
        if self.config.disable_tqdm:
            print(sentence, flush=True)
        else:
            self.progress.write(sentence)

    def flush(self) -> None:
        """Everything so far is on disk: called before a checkpoint that vouches for it."""
        self.file.flush()

    def throughput(self) -> str:
        """Steady-state samples/s: the median of the steps after the first tenth."""
        steady = self.all_times[len(self.all_times) // 10 :]
        median = float(np.median([seconds for seconds, _ in steady])) if steady else float("nan")
        rate = self.samples_per_step / median
        return (
            f"{rate:.1f} samples/s, {median * 1000:.1f} ms a step (median of {len(steady)} steps), "
            f"{share_of_waiting(steady):.0%} waiting for data"
        )

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


def logs_folder(config: TrainConfig, output_dir: Path) -> Path:
    return Path(config.logging_dir or output_dir / "logs")


class Silent:
    """The Metrics of processes other than the main one, which speaks for all."""

    def step(self, record: dict[str, Any]) -> None: ...
    def image(self, name: str, image: Image.Image, step: int) -> None: ...
    def say(self, sentence: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def throughput(self) -> str:
        return ""


class Timed:
    """Batches as they come, and how long they were waited for."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - started
        return batch

    def seconds(self) -> float:
        """Since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited


def share_of_waiting(times: list[tuple[float, float]]) -> float:
    total = sum(seconds for seconds, _ in times)
    return sum(waited for _, waited in times) / total if total else 0.0


def advice(config: TrainConfig, old_layout: bool) -> str:
    """What makes data come faster."""
    cores = os.cpu_count() or 1
    num_workers = min(config.dataloader_num_workers, cores)
    ways = [f"more --dataloader_num_workers (now {num_workers} of {cores} cores)"] if num_workers < cores else []
    ways.append("features on a local disk")
    if old_layout:
        ways.append("a feature store instead of the old layout (`uvit features import`)")
    return ", ".join(ways)


def keep_lines(path: Path, last_step: int) -> list[float]:
    """Cut metrics.jsonl after `last_step`: what a killed run wrote past its checkpoint is done again.

    Returns the losses since the last logged step, so that the next mean is what it would have been.
    """
    if not path.exists():
        return []
    kept: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            raise UserError(f"{path}, line {number}: is not JSON; move the file away to go on") from None
        if record is None or record["step"] > last_step:
            break
        kept.append(record)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    aside.replace(path)
    return [record["loss"] for record in kept if record["loss"] is not None]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
