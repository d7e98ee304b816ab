"""Checkpoint folders on disk: how one is committed, read, found and deleted.

A checkpoint is a folder `checkpoint-{step}`. It holds safetensors files (weights, EMA weights, optimizer) and
`uvit.json`: a readable record of what it is (config, networks, step, samples seen, versions), with the size and SHA-256
of each file, and a SHA-256 of the record itself. Older ones have sizes only.

This module needs no torch, so that `uvit checkpoints` starts at once.

A checkpoint is complete or absent. It is written under a hidden name (`uvit.checkpoint.saver`). `commit_folder` then
adds the record and renames the folder. Hidden names in a run's folder:

- `.checkpoint-{step}.writing`: not committed yet.
- `.checkpoint-{step}.replaced`: complete; a second checkpoint of this step is about to take its name.
- `.checkpoint-{step}.deleting`: on its way out, by `--save_total_limit`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uvit.config.paths import expand_recorded
from uvit.errors import UserError, differences
from uvit.io import file_sha256, sync_path, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from uvit.checkpoint.tensors import LocalSlices

RECORD = "uvit.json"
TRAINING_FILE = "training.json"  # in a pipeline folder: the training run that it comes from
BEST = "best.json"  # in a run's folder: the checkpoint with the best value of --keep_best
CHECKPOINT_FORMAT = 2
MAX_HASHING = 4  # files read at a time
QUIET_FLAGS = {
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm", "features_in_memory",
}  # fmt: skip


# Committing


def commit_folder(aside: Path, folder: Path, record: dict[str, Any], written: Mapping[str, tuple[int, str]]) -> None:
    """Turn `aside`, whose files are written and synced, into the checkpoint `folder`. An older one there is deleted.

    written: file -> (bytes, SHA-256).
    """
    for name, (size, _) in written.items():
        if not (aside / name).exists() or (aside / name).stat().st_size != size:
            raise UserError(f"{aside / name}: process 0 cannot see this file; all processes must share this disk")
    record = record | {
        "files": {name: size for name, (size, _) in sorted(written.items())},
        "sha256": {name: sha256 for name, (_, sha256) in sorted(written.items())},
    }
    record["record_sha256"] = record_digest(record)
    write_json(aside / RECORD, record)
    sync_path(aside)
    if folder.exists():  # after a rollback, a run reaches the same step again
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)  # `checkpoint_folders` finds it there if a kill comes now
    aside.rename(folder)
    sync_path(folder.parent)
    clean_up(folder.parent, ("replaced",))


def clean_up(output_dir: Path, kinds: tuple[str, ...]) -> None:
    """Delete the hidden folders that a kill left behind."""
    for kind in kinds:
        for path in output_dir.glob(f".checkpoint-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def keep_latest(output_dir: Path, limit: int | None, keep: Collection[str] = ()) -> None:
    """Delete all checkpoints before the latest `limit` complete ones, but never one whose name is in `keep`."""
    if not limit:
        return
    found = checkpoint_folders(output_dir)
    complete = [folder for folder in found if is_complete(folder)]
    if len(complete) <= limit:
        return
    for folder in found[: found.index(complete[-limit])]:
        if folder.name not in keep:
            delete(folder)


def delete_after(output_dir: Path, step: int) -> None:
    """Delete all checkpoints of later steps, which a rollback leaves behind: the latest first."""
    for folder in reversed(checkpoint_folders(output_dir)):
        if (step_of(folder) or 0) > step:
            delete(folder)


def delete(folder: Path) -> None:
    """A kill must not leave half a checkpoint by its name."""
    aside = folder.with_name(f".{folder.name.removeprefix('.')}.{secrets.token_hex(4)}.deleting")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # another process may still read it; the next save deletes the rest


# Reading


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return self.record["step"]

    def files(self, group: str) -> list[Path]:
        """The files of `weights`, `ema` or `optimizer`: one, or one per process that wrote. Empty if there are none."""
        pattern = re.compile(rf"{group}(-\d+-of-\d+)?\.safetensors")
        return [self.folder / name for name in self.record["files"] if pattern.fullmatch(name)]

    def changed_flags(self, config: Any) -> dict[str, str]:
        """The flags whose values changed, without those that change nothing: {flag: "--flag: was 1, now 2"}."""
        before = expand_recorded(type(config), self.record["config"])
        now = json.loads(json.dumps(dataclasses.asdict(config)))  # JSON turns tuples into lists, as in the record
        known = {key: value for key, value in now.items() if key not in QUIET_FLAGS and key in before}
        found = differences({key: before[key] for key in known}, known)
        return {key: f"--{line}" for key, line in found.items()}

    def load(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read all tensors of a group, each whole. Raises UserError if a file is damaged."""
        from uvit.checkpoint.tensors import read_whole

        paths = self._existing_files(group)
        self.verify([path.name for path in paths])
        return read_whole(paths, device)

    def load_into(self, group: str, targets: Mapping[str, Tensor | LocalSlices]) -> None:
        """Fill tensors, DTensors or `LocalSlices` in place, whatever layout of processes wrote the checkpoint.

        Raises UserError if names, shapes or dtypes differ. Some targets may be filled by then. Checksums are not
        compared: call `verify` before, for the files of which no other process does.
        """
        from uvit.checkpoint.tensors import read_into

        read_into(self._existing_files(group), targets)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read files, or all, and compare their SHA-256. Raises UserError if one is damaged."""
        if damaged := self.damaged_files(names):
            raise UserError(
                f"{self.folder}: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} damaged (the recorded "
                "SHA-256 is another); use another checkpoint"
            )

    def damaged_files(
        self, names: Iterable[str] | None = None, advance: Callable[[int], object] = lambda _: None
    ) -> list[str]:
        """The names of the files, of these or of all, whose SHA-256 is not the recorded one, or that cannot be read.

        Older checkpoints have none to compare. advance: called with the size of each file that was read.
        """
        expected = self.record.get("sha256", {})
        wanted = list(self.record["files"] if names is None else names)
        damaged = []
        with ThreadPoolExecutor(MAX_HASHING) as pool:
            digests = pool.map(lambda name: file_digest(self.folder / name) if name in expected else None, wanted)
            for name, digest in zip(wanted, digests, strict=True):
                if digest != expected.get(name):
                    damaged.append(name)
                advance(self.record["files"][name])
        return damaged

    def _existing_files(self, group: str) -> list[Path]:
        if paths := self.files(group):
            return paths
        raise UserError(f"{self.folder}: has no {group}; use another checkpoint")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the record and compare the file sizes. Raises UserError if the folder is not a complete checkpoint."""
    path = folder / RECORD
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such checkpoint")
    if not path.exists() and (theirs := [*folder.glob("nnet*.pth"), *folder.glob("*.pdparams")]):
        raise UserError(
            f"{folder}: is a checkpoint of the official U-ViT code or of PaddleMIX ({theirs[0].name}); to train on "
            f"from its weights, pass --pretrained_model_name_or_path {folder} and a new --output_dir"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is not a checkpoint ({RECORD} cannot be read: {error})") from None
    if not isinstance(record, dict) or (record.get("format"), type(record.get("files"))) != (CHECKPOINT_FORMAT, dict):
        raise UserError(f"{path}: is not of the checkpoint format {CHECKPOINT_FORMAT} that this version reads")
    if record.get("record_sha256", "") not in ("", record_digest(record)):
        raise UserError(
            f"{path}: is damaged (its SHA-256 is not the recorded one); use another checkpoint, or remove "
            "record_sha256 from it if you changed it yourself"
        )
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{folder}: is not complete, {name} {problem}; use another checkpoint")
    return Checkpoint(folder, record)


def record_digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record without its own."""
    content = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file; empty if it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return ""


def read_verified(folder: Path) -> Checkpoint:
    """The same as `read_checkpoint`, and compare the checksums of all files."""
    checkpoint = read_checkpoint(folder)
    checkpoint.verify()
    return checkpoint


def is_complete(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except UserError:
        return False
    return True


def check_command(found: Checkpoint, command: str) -> None:
    """Refuse the checkpoint of another command. Those of `uvit train` name none."""
    if (theirs := found.record.get("command", "uvit train")) != command:
        raise UserError(f"{found.folder}: is a checkpoint of `{theirs}`, not of `{command}`; choose another folder")


# Finding


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders of all checkpoints, the latest last.

    A checkpoint is `checkpoint-{step}`, or `.checkpoint-{step}.replaced` if a kill came before its successor was in
    place.
    """
    found = {}
    for path in output_dir.glob(".checkpoint-*.replaced"):
        found[path.name[len(".checkpoint-") : -len(".replaced")]] = path
    for path in output_dir.glob("checkpoint-*"):
        found[path.name[len("checkpoint-") :]] = path
    return [found[step] for step in sorted((s for s in found if s.isdigit() and found[s].is_dir()), key=int)]


def step_of(folder: Path) -> int | None:
    digits = "".join(filter(str.isdigit, folder.name))
    return int(digits) if digits else None


def training_facts(pipeline: Path) -> dict[str, Any]:
    """What a pipeline folder records of its training run; empty if it records nothing."""
    try:
        facts = json.loads((pipeline / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def latest_complete(output_dir: Path) -> Path | None:
    """The folder of the latest checkpoint with all its files; None if there is none."""
    return next(filter(is_complete, reversed(checkpoint_folders(output_dir))), None)


def newer_checkpoint(pipeline: Path) -> Path | None:
    """The latest checkpoint of a run, if the run's pipeline (`RUN/pipeline`) is of an earlier step."""
    found = latest_complete(pipeline.parent) if pipeline.name == "pipeline" else None
    step = training_facts(pipeline).get("step")
    return found if found and isinstance(step, int) and (step_of(found) or 0) > step else None


def read_best(output_dir: Path) -> dict[str, Any] | None:
    """metric, value, step and checkpoint (its name) of best.json; None if there is none that can be read."""
    try:
        best = json.loads((output_dir / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = {"metric": str, "value": float, "step": int, "checkpoint": str}
    is_best = isinstance(best, dict) and all(isinstance(best.get(key), kind) for key, kind in kinds.items())
    return best if is_best else None


def latest_checkpoint(
    output_dir: Path,
    read: Callable[[Path], Checkpoint] = read_verified,
    find: Callable[[Path], list[Path]] = checkpoint_folders,
) -> Checkpoint | None:
    """The latest whole checkpoint; None if there is not one. Prints which later ones it skips, and why.

    Raises UserError if there are checkpoints and none is whole.
    """
    problems = []
    for folder in reversed(find(output_dir)):
        try:
            return read(folder)
        except UserError as error:
            problems.append(str(error))
            print(f"skipped: {error}")
    if problems:
        raise UserError(
            f"--output_dir {output_dir}: has {len(problems)} checkpoint{'s'[: len(problems) > 1]} and none is whole "
            f"({problems[0]}); restore one from a backup, or pass --overwrite_output_dir to start from scratch, which "
            "keeps this folder under another name"
        )
    return None
