"""`uvit checkpoints list` and `uvit checkpoints verify`. They need no torch, so they start at once."""

import contextlib
import json
from collections import deque
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from uvit.checkpoint.folder import RECORD, checkpoint_folders, read_best, read_checkpoint, step_of
from uvit.config.checkpoints import CheckpointsListConfig, CheckpointsVerifyConfig
from uvit.errors import UserError
from uvit.io import format_bytes
from uvit.lock import LOCK, current_writer
from uvit.progress import Progress


def list_checkpoints(config: CheckpointsListConfig) -> None:
    """Raises UserError if there are no checkpoints."""
    folders = find_checkpoints(config.path)
    found = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # --save_total_limit has just deleted it
            found.append(describe_checkpoint(folder))
    losses = logged_losses(folders)
    best = read_best(folders[0].parent)
    for entry in found:
        entry |= losses.get(entry["step"], {})
        if best and Path(entry["folder"]).name == best["checkpoint"]:
            entry["best"] = {best["metric"]: best["value"]}
    if config.json:
        print(json.dumps({"path": str(Path(config.path).absolute()), "checkpoints": found}, indent=1))
        return
    rows = [("step", "samples", "size", "saved", "loss", "val loss", "")]
    rows += [
        (
            f"{entry['step']:,}",
            number(entry.get("samples"), ",d"),
            format_bytes(entry["bytes"]),
            datetime.fromisoformat(entry["saved"]).strftime("%Y-%m-%d %H:%M"),
            number(entry.get("loss"), ".4f"),
            number(entry.get("val_loss"), ".4f"),
            "; ".join(
                [
                    *(f"best {metric}: {value:.4g}" for metric, value in entry.get("best", {}).items()),
                    *([entry["problem"]] if entry["problem"] else []),
                ]
            ),
        )
        for entry in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for *columns, problem in rows:
        line = "  ".join(f"{text:>{width}}" for text, width in zip(columns, widths, strict=True))
        print(f"{line}  {problem}".rstrip())
    if writer := current_writer(folders[0].parent / LOCK):
        print(f"in use by {writer}")


def verify_checkpoints(config: CheckpointsVerifyConfig) -> int:
    """Print what is wrong, by file. Returns the exit status. Raises UserError if there are no checkpoints."""
    folders = find_checkpoints(config.path)
    results = []
    total = sum(map(size_of, folders))
    with Progress("verify", total, "byte", bar=not config.disable_tqdm, lines=not config.json) as progress:
        for folder in folders:
            result = verify_checkpoint(folder, progress)
            if folder.is_dir():  # else --save_total_limit has just deleted it
                results.append(result)
    if config.json:
        print(json.dumps({"path": str(Path(config.path).absolute()), "checkpoints": results}, indent=1))
    else:
        for result in results:
            print(
                f"{result['folder']}: {result['problem'] or 'whole'}{'' if result['has_checksums'] else NO_CHECKSUMS}"
            )
    return 2 if any(result["problem"] for result in results) else 0


NO_CHECKSUMS = " (it has no checksums: only sizes were compared)"


def verify_checkpoint(folder: Path, progress: Progress) -> dict[str, Any]:
    """-> folder, step, whole, problem (None if there is none), damaged (names of files), has_checksums."""
    result: dict[str, Any] = {"folder": str(folder), "step": step_of(folder), "damaged": []}
    problem, has_checksums = None, True
    try:
        checkpoint = read_checkpoint(folder)
        has_checksums = "sha256" in checkpoint.record
        result["damaged"] = checkpoint.damaged_files(advance=progress.update)
        if result["damaged"]:
            problem = f"damaged: {', '.join(result['damaged'])}"
    except UserError as error:
        problem = str(error).removeprefix(f"{folder}: ")
    return result | {"whole": problem is None, "problem": problem, "has_checksums": has_checksums}


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """What `--json` prints of a checkpoint, but for the losses."""
    problem, record = None, {}
    try:
        record = read_checkpoint(folder).record
    except UserError as error:
        problem = str(error).removeprefix(f"{folder}: ")
    path = folder / RECORD
    saved = (path if path.exists() else folder).stat().st_mtime
    return {
        "folder": str(folder),
        "step": step_of(folder),
        "samples": record.get("samples"),
        "bytes": size_of(folder),
        "saved": datetime.fromtimestamp(saved).astimezone().isoformat(timespec="seconds"),
        "complete": problem is None,
        "problem": problem,
    }


def logged_losses(folders: list[Path]) -> Mapping[int, dict[str, float]]:
    """{step: {loss, val_loss}} of a run's checkpoints, as far as metrics.jsonl knows them.

    The loss is the mean since --logging_steps before, the validation loss the last one.
    """
    config: dict[str, Any] = {}
    for folder in folders:
        with contextlib.suppress(UserError):
            config = read_checkpoint(folder).record.get("config", {})
    log = Path(config.get("logging_dir") or folders[0].parent / "logs") / "metrics.jsonl"
    wanted, found = {step_of(folder) for folder in folders}, {}
    recent: deque[str] = deque(maxlen=config.get("logging_steps", 1))
    validation: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), log.open(encoding="utf-8") as file:
        for line in file:
            recent.append(line)
            if '"val_loss"' in line:
                validation = {"val_loss": json.loads(line)["val_loss"]}
            # Only a few of a million lines are parsed.
            if int(line[line.index(":") + 1 : line.index(",")]) in wanted:
                losses = [record["loss"] for record in map(json.loads, recent) if record["loss"] is not None]
                mean = {"loss": sum(losses) / len(losses)} if losses else {}
                found[json.loads(line)["step"]] = mean | validation
    return found


def find_checkpoints(path: str) -> list[Path]:
    """The checkpoints of a run's folder, or the one that the path names. Raises UserError if there are none."""
    folder = Path(path)
    if found := checkpoint_folders(folder):
        return found
    if (folder / RECORD).is_file():
        return [folder]
    problem = "has no checkpoints" if folder.is_dir() else "there is no such folder"
    raise UserError(f"--path {path}: {problem}; give the --output_dir of `uvit train` or `uvit autoencoder`")


def size_of(folder: Path) -> int:
    """Bytes of the files that training reads."""
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 0


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
