"""The folders of checkpoints: which are there, which are whole, and what they say of the run that wrote them."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit.checkpoint.tensors import LocalSlices, read_into, read_whole
from uvit.errors import UserError

RECORD = "uvit.json"
CHECKPOINT_FORMAT = 2
QUIET_FLAGS = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm"}


# Reading


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return self.record["step"]

    def files(self, group: str) -> list[Path]:
        """Those of `weights`, `ema` or `optimizer`: one, or one for each process that wrote; none if it has no such."""
        pattern = re.compile(rf"{group}(-\d+-of-\d+)?\.safetensors")
        return [self.folder / name for name in self.record["files"] if pattern.fullmatch(name)]

    def changed_flags(self, config: Any) -> dict[str, str]:
        """{flag: what it was and is now}, of the config dataclass's flags that change something."""
        before, now = (
            self.record["config"],
            json.loads(json.dumps(dataclasses.asdict(config))),
        )  # a tuple is a list there
        changed = [key for key in now if key not in QUIET_FLAGS and key in before and before[key] != now[key]]
        return {key: f"--{key} was {before[key]} and is now {now[key]}" for key in changed}

    def load(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Its tensors, whole."""
        return read_whole(self._some_files(group), device)

    def load_into(self, group: str, targets: Mapping[str, Tensor | LocalSlices]) -> None:
        """Fill tensors, DTensors or `Pieces` in place, whatever layout wrote them.

        Raises UserError where names, whole shapes or dtypes are others; the targets may be half filled then.
        """
        read_into(self._some_files(group), targets)

    def _some_files(self, group: str) -> list[Path]:
        if paths := self.files(group):
            return paths
        raise UserError(f"{self.folder}: has no {group}; use another checkpoint")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Raises UserError, saying why, where the folder is not a whole checkpoint."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is not a checkpoint ({RECORD} cannot be read: {error})") from None
    if not isinstance(record, dict) or (record.get("format"), type(record.get("files"))) != (CHECKPOINT_FORMAT, dict):
        raise UserError(f"{path}: is not of the checkpoint format {CHECKPOINT_FORMAT} that this version reads")
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{folder}: is not whole, {name} {what}; use another checkpoint")
    return Checkpoint(folder, record)


def check_command(found: Checkpoint, command: str) -> None:
    """Refuse the checkpoint of another command. Those of `uvit train` name none."""
    if (theirs := found.record.get("command", "uvit train")) != command:
        raise UserError(f"{found.folder}: is a checkpoint of `{theirs}`, not of `{command}`; choose another folder")


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """All checkpoints' folders, the latest last.

    `checkpoint-{step}`; or, after a kill in the instant in which a second one of that step took the place of the first,
    the first one's hidden name.
    """
    found = {}
    for path in output_dir.glob(".checkpoint-*.replaced"):
        found[path.name[len(".checkpoint-") : -len(".replaced")]] = path
    for path in output_dir.glob("checkpoint-*"):
        found[path.name[len("checkpoint-") :]] = path
    return [found[step] for step in sorted((s for s in found if s.isdigit() and found[s].is_dir()), key=int)]


def latest_checkpoint(output_dir: Path) -> Checkpoint | None:
    """The latest whole checkpoint; says which ones it passes over, and why."""
    for folder in reversed(checkpoint_folders(output_dir)):
        try:
            return read_checkpoint(folder)
        except UserError as error:
            print(f"passed over: {error}")
    return None


def is_whole(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except UserError:
        return False
    return True
