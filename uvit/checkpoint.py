"""Checkpoints on disk: whole or not at all.

A checkpoint is a folder `checkpoint-{step}`: safetensors files, and `uvit.json`, which says in readable form what it is
(config, networks, step, samples seen, versions) and how large each file is. It is written under another name, synced
and renamed, so a kill at any moment leaves the last whole one.
"""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from uvit.errors import UserError

RECORD = "uvit.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return self.record["step"]

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of one of its files, `weights`, `ema` or `optimizer`."""
        try:
            tensors = load_file(self.folder / f"{name}.safetensors", device=str(device))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name}.safetensors: cannot be read ({error}); use another checkpoint"
            ) from None
        return {key: tensor.clone() for key, tensor in tensors.items()}  # no longer mapped to the file


def save(output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> Path:
    """Write `checkpoint-{step}`; `tensors` maps the files' names to what they hold."""
    folder = output_dir / f"checkpoint-{step}"
    aside = output_dir / f".checkpoint-{step}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in tensors.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in content.items()}, aside / f"{name}.safetensors")
    sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    record = {"format": FORMAT, "step": step, **record, "files": sizes}
    (aside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    replaced = output_dir / f".checkpoint-{step}.replaced"
    if folder.exists():  # a run that went back to an earlier checkpoint comes by again
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    aside.rename(folder)
    _sync(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def read(folder: Path) -> Checkpoint:
    """Raises UserError, saying why, where the folder is not a whole checkpoint."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is not a checkpoint ({RECORD} cannot be read: {error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: is not of the checkpoint format {FORMAT} that this version reads")
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{folder}: is not whole, {name} {what}; use another checkpoint")
    return Checkpoint(folder, record)


def folders(output_dir: Path) -> list[Path]:
    """All `checkpoint-{step}` folders, the latest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def latest(output_dir: Path) -> Checkpoint | None:
    """The latest whole checkpoint; says which ones it passes over, and why."""
    for folder in reversed(folders(output_dir)):
        try:
            return read(folder)
        except UserError as error:
            print(f"passed over: {error}")
    return None


def keep_latest(output_dir: Path, limit: int | None) -> None:
    """Delete all but the latest `limit` checkpoints, as `--save_total_limit` asks."""
    for folder in folders(output_dir)[:-limit] if limit else []:
        aside = folder.with_name(f".{folder.name}.deleting")  # never half a checkpoint under a checkpoint's name
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside)


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as tensors called `exp_avg/unet.pos_embed` and so on."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    for parameter, name in names.items():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in keys if f"{key}/{name}" in tensors}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
