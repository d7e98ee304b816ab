"""What a run reports: a line of metrics.jsonl for each step, curves in the trackers, progress on the console."""

import importlib.util
import json
import os
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.io import write_bytes
from uvit.progress import Progress, duration, is_terminal, write
from uvit.train.clock import PHASES
from uvit.train.profiling import MfuReference
from uvit.train.validate import TIMESTEPS

PART_SECONDS = tuple(f"{part}_seconds" for part in PHASES)
SHARE_TO_SHOW, SHARE_TO_WARN = 0.05, 0.2  # of the time, spent waiting for data


class Metrics:
    """Records each step until `close`. A resumed run continues after the line of its checkpoint's step.

    A terminal gets a bar. Without one, and in a file or a pipe, stdout gets a line every --logging_steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        output_dir: Path,
        first_step: int,
        max_steps: int,
        samples_per_step: int,
        mfu_reference: MfuReference,
        npy_features: bool = False,
    ):
        self.config, self.max_steps, self.samples_per_step = config, max_steps, samples_per_step
        self.mfu_reference = mfu_reference
        folder = logs_folder(config, output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "metrics.jsonl"
        self.losses = truncate_log(log, first_step, config.logging_steps)  # since the last logged step
        self.file = log.open("a", encoding="utf-8")
        self.trackers = open_trackers(config, output_dir, folder, first_step)
        bar = not config.disable_tqdm
        self.progress = Progress("train", max_steps, "step", done=first_step, bar=bar, lines=False)
        self.prints_lines = self.progress.bar is None or not is_terminal(sys.stdout)
        self.recent: deque[float] = deque(maxlen=max(config.logging_steps, 2))
        self.times: list[dict[str, float]] = []  # since the last line
        self.all_times: list[dict[str, float]] = []  # for --benchmark
        self.num_reports, self.warned = 0, False
        self.data_hints = data_hints(config, npy_features)
        self.last_validation = self.last_evaluation = ""
        self.skipped = 0

    def step(self, record: dict[str, Any]) -> None:
        """One step: its number, samples, loss, grad_norm, lr, skipped, what was measured, validation, evaluation."""
        record |= {
            "samples_per_second": round(self.samples_per_step / record["seconds"], 3),
            "mfu": _rounded(self.mfu_reference.utilisation(record["seconds"])),
        }
        self.file.write(json.dumps(record) + "\n")
        self.recent.append(record["seconds"])
        self.skipped += record["skipped"]
        self.times.append({name: record[name] for name in ("seconds", *PART_SECONDS)})
        if self.config.benchmark:
            self.all_times.append(self.times[-1])
        if "val_loss" in record:
            self._record_validation(record)
        if scores := {name.removeprefix("eval_"): record[name] for name in record if name.startswith("eval_")}:
            self._record_evaluation(scores, record)
        if record["loss"] is not None:  # None: not finite, the update was skipped
            self.losses.append(record["loss"])
        self.progress.update()
        if record["step"] % self.config.logging_steps == 0 or record["step"] == self.max_steps:
            self._report(record)

    def _report(self, record: dict[str, Any]) -> None:
        """On the console and in the trackers: the steps since the last report."""
        loss = float(np.mean(self.losses[-self.config.logging_steps :])) if self.losses else float("nan")
        self.losses.clear()
        grad_norm = float("nan") if record["grad_norm"] is None else record["grad_norm"]
        seconds = sum(self.recent) / len(self.recent)
        rate, mfu = self.samples_per_step / seconds, self.mfu_reference.utilisation(seconds)
        waiting = data_wait_share(self.times)
        line = f"loss {loss:.4f}, |grad| {grad_norm:.3g}, lr {record['lr']:.2e}, {rate:.1f} samples/s"
        if "muon_lr" in record:
            line += f", muon_lr {record['muon_lr']:.2e}"
        if mfu is not None:
            line += f", {mfu:.0%} MFU"
        if waiting > SHARE_TO_SHOW:
            line += f", {waiting:.0%} waiting for data"
        line += self.last_validation + self.last_evaluation
        if self.skipped:
            line += f", {self.skipped} skipped"
        self.progress.note(line)
        if self.prints_lines:
            left = duration((self.max_steps - record["step"]) * seconds)
            write(f"step {record['step']}/{self.max_steps}: {line}, {left} left")

        points = {"loss": loss, "grad_norm": grad_norm, "lr": record["lr"], "samples_per_second": rate}
        points |= {
            "data_share": waiting,
            "skipped": self.skipped,
            "peak_memory_gib": record["peak_memory_bytes"] / 2**30,
        }
        points |= {} if mfu is None else {"mfu": mfu}
        points |= {"muon_lr": record["muon_lr"]} if "muon_lr" in record else {}
        points |= {name: float(np.mean([times[name] for times in self.times])) for name in self.times[0]}
        self._show({f"train/{name}": value for name, value in points.items()}, record["step"])

        # The first report is no reason to warn: it includes the start of the workers.
        if waiting > SHARE_TO_WARN and self.num_reports and not self.warned:
            self.write(f"{waiting:.0%} of the last steps was spent waiting for data. What helps: {self.data_hints}.")
            self.warned = True
        self.num_reports += 1
        self.times.clear()

    def _record_validation(self, record: dict[str, Any]) -> None:
        if record["val_loss"] is not None:
            self.last_validation = f", val {record['val_loss']:.4f} at step {record['step']}"
        points = {"loss": record["val_loss"], "loss_raw": record["val_loss_raw"]}
        points |= {f"loss_t{timestep}": value for timestep, value in zip(TIMESTEPS, record["val_losses"], strict=True)}
        self._show({f"val/{name}": value for name, value in points.items() if value is not None}, record["step"])

    def _record_evaluation(self, scores: dict[str, float | None], record: dict[str, Any]) -> None:
        points = {name: value for name, value in scores.items() if value is not None}
        shown = [f"{name} {value:.4g}" for name, value in points.items()]
        if shown:
            self.last_evaluation = f", {shown[0]} at step {record['step']}"
            seconds = record["evaluation_seconds"]
            self.write(f"evaluation at step {record['step']}: {', '.join(shown)} ({seconds:.1f} s)")
        self._show({f"eval/{name}": value for name, value in points.items()}, record["step"])

    def _show(self, points: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.scalars(points, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        for tracker in self.trackers:
            tracker.image(name, image, step)

    def write(self, sentence: str) -> None:
        """Print a line without tearing the bar."""
        write(sentence)

    def flush(self) -> None:
        """Write everything so far to the file, before a checkpoint is saved that continues from it."""
        self.file.flush()

    def throughput(self) -> str:
        """Steady-state samples/s: the median over the steps after the first tenth."""
        steady = self.all_times[len(self.all_times) // 10 :]
        median = float(np.median([times["seconds"] for times in steady])) if steady else float("nan")
        mfu = self.mfu_reference.utilisation(median)
        return (
            f"{self.samples_per_step / median:.1f} samples/s, {median * 1000:.1f} ms a step (median of {len(steady)} "
            f"steps), {'' if mfu is None else f'{mfu:.1%} MFU, '}{data_wait_share(steady):.0%} waiting for data"
        )

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def logs_folder(config: TrainConfig, output_dir: Path) -> Path:
    return Path(config.logging_dir or output_dir / "logs")


class NullMetrics:
    """The Metrics of all processes but the main one, which reports for all of them."""

    def step(self, record: dict[str, Any]) -> None: ...
    def image(self, name: str, image: Image.Image, step: int) -> None: ...
    def write(self, sentence: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def throughput(self) -> str:
        return ""


def data_wait_share(times: list[dict[str, float]]) -> float:
    total = sum(step["seconds"] for step in times)
    return sum(step["data_seconds"] for step in times) / total if total else 0.0


def data_hints(config: TrainConfig, npy_features: bool) -> str:
    """What makes loading faster."""
    cores = os.cpu_count() or 1
    num_workers = min(config.dataloader_num_workers, cores)
    hints = [f"more --dataloader_num_workers (now {num_workers} of {cores} cores)"] if num_workers < cores else []
    hints.append("features on a local disk")
    if npy_features:
        hints.append("a feature store instead of `.npy` features (`uvit features import`)")
    return ", ".join(hints)


def truncate_log(path: Path, last_step: int, logging_steps: int) -> list[float]:
    """Cut metrics.jsonl after `last_step`: a resumed run repeats the steps after its checkpoint.

    Returns the losses since the last logged step, so that the next mean is what it would have been.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end, logged, losses = 0, last_step - last_step % logging_steps, list[float]()
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            step, loss = record["step"], record["loss"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: is no line of metrics; move the file away to resume") from None
        if step > last_step:
            break
        end += len(line)
        losses += [loss] if loss is not None and step > logged else []
    if end < len(content):
        write_bytes(path, content[:end])
    return losses


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


# Trackers: TensorBoard, Weights & Biases


class Tracker(Protocol):
    def scalars(self, points: dict[str, float], step: int) -> None:
        """Points of curves: {`train/loss`: ..., ...}."""
        ...

    def image(self, name: str, image: Image.Image, step: int) -> None: ...

    def close(self) -> None: ...


def open_trackers(config: TrainConfig, output_dir: Path, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers that the flags ask for, from step `first_step` on. `folder` holds the logs."""
    trackers: list[Tracker] = []
    if config.enable_tensorboard and config.report_to in ("tensorboard", "all"):
        trackers.append(TensorBoard(folder, first_step))
    if config.report_to == "wandb" or (config.report_to == "all" and has_wandb()):
        trackers.append(WeightsAndBiases(config, output_dir, folder, first_step))
    return trackers


def has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def check_trackers(config: TrainConfig) -> None:
    """Raises UserError if Weights & Biases is asked for by name and is not installed."""
    if config.report_to == "wandb" and not has_wandb():
        raise UserError("--report_to wandb: Weights & Biases is not installed; pip install wandb")


class TensorBoard:
    """A resumed run removes the points after its checkpoint."""

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
    """Each start and each resume is a run of its own, in the project $WANDB_PROJECT, or else `uvit`."""

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
