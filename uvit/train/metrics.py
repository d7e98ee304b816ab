"""What a run tells: a line a step in metrics.jsonl, points in TensorBoard, progress on the console."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from uvit.config.train import TrainConfig
from uvit.errors import UserError


class Metrics:
    """Records step after step; `close` ends it. A run that resumes goes on from the line of its checkpoint's step."""

    def __init__(self, config: TrainConfig, output_dir: Path, first_step: int, max_steps: int, samples_per_step: int):
        self.config, self.max_steps, self.samples_per_step = config, max_steps, samples_per_step
        folder = Path(config.logging_dir or output_dir / "logs")
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
        self.started = time.perf_counter()
        self.seconds: list[float] = []
        self.skipped = 0

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: step, samples, loss, grad_norm, lr, skipped, seconds."""
        self.file.write(json.dumps(record) + "\n")
        self.recent.append(record["seconds"])
        self.skipped += record["skipped"]
        if self.config.benchmark:
            self.seconds.append(record["seconds"])
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
        if self.skipped:
            line += f", {self.skipped} skipped"
        self.progress.set_postfix_str(line, refresh=False)
        if self.config.disable_tqdm:
            left = (self.max_steps - record["step"]) * self.samples_per_step / rate
            print(f"step {record['step']}/{self.max_steps}: {line}, {_duration(left)} left", flush=True)
        if self.board is not None:
            points = {"loss": loss, "grad_norm": grad_norm, "lr": record["lr"], "samples_per_second": rate}
            for name, value in points.items():
                self.board.add_scalar(f"train/{name}", value, record["step"])

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
        steady = self.seconds[len(self.seconds) // 10 :]
        median = float(np.median(steady)) if steady else float("nan")
        rate = self.samples_per_step / median
        return f"{rate:.1f} samples/s, {median * 1000:.1f} ms a step (median of {len(steady)} steps)"

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


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
