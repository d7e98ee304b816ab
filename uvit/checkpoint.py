"""Checkpoints on disk: whole or not at all.

A checkpoint is a folder `checkpoint-{step}`: safetensors files, and `uvit.json`, which says in readable form what it is
(config, networks, step, samples seen, versions) and how large each file is. It is written under another name, synced
and renamed, so a kill at any moment leaves the last whole one. Where several processes train, each writes what it
holds (`uvit.shards`), and the folder gets its name once all of them have.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from uvit.errors import UserError
from uvit.shards import Groups, Pieces, Place, divide, places_of, read_into, read_whole, write_pieces

RECORD = "uvit.json"
FORMAT = 2

# Hands over an object and gets those of all processes, in the order of their ranks.
Exchange = Callable[[Any], list[Any]]


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

    def load(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Its tensors, whole."""
        return read_whole(self._some_files(group), device)

    def load_into(self, group: str, targets: Mapping[str, Tensor | Pieces]) -> None:
        """Fill tensors, DTensors or `Pieces` in place, whatever layout wrote them.

        Raises UserError where names, whole shapes or dtypes are others; the targets may be half filled then.
        """
        read_into(self._some_files(group), targets)

    def _some_files(self, group: str) -> list[Path]:
        if paths := self.files(group):
            return paths
        raise UserError(f"{self.folder}: has no {group}; use another checkpoint")


def read(folder: Path) -> Checkpoint:
    """Raises UserError, saying why, where the folder is not a whole checkpoint."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is not a checkpoint ({RECORD} cannot be read: {error})") from None
    if not isinstance(record, dict) or (record.get("format"), type(record.get("files"))) != (FORMAT, dict):
        raise UserError(f"{path}: is not of the checkpoint format {FORMAT} that this version reads")
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{folder}: is not whole, {name} {what}; use another checkpoint")
    return Checkpoint(folder, record)


def folders(output_dir: Path) -> list[Path]:
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


def latest(output_dir: Path) -> Checkpoint | None:
    """The latest whole checkpoint; says which ones it passes over, and why."""
    for folder in reversed(folders(output_dir)):
        try:
            return read(folder)
        except UserError as error:
            print(f"passed over: {error}")
    return None


# Writing


def alone(value: Any) -> list[Any]:
    """The `Exchange` of a single process."""
    return [value]


class Saver:
    """Saves a run's checkpoints while training goes on.

    `save` only copies the tensors; a thread writes them. What goes wrong there is raised by the next `save` or `wait`,
    on all processes: a UserError where the disk did not take it. All processes of a run make one, and call `save` and
    `wait` alike; `exchange` must not be used by anything else. Use it as a context manager: leaving it waits.
    """

    def __init__(self, output_dir: Path, limit: int | None = None, rank: int = 0, exchange: Exchange = alone):
        """limit: how many checkpoints to keep, as `--save_total_limit` asks. None: all."""
        self.output_dir, self.limit, self.rank, self.exchange = output_dir, limit, rank, exchange
        self._buffers: dict[Place, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Path | None = None

    def save(self, step: int, tensors: Groups, record: dict[str, Any]) -> None:
        """Begin to write `checkpoint-{step}`, after waiting for the one before.

        `tensors` maps the groups weights, ema and optimizer to names to what this process holds. They may change as
        soon as this returns. `record` says what the run is; that of rank 0 counts.
        """
        self.wait()
        held = places_of(tensors)
        mine = divide(self.exchange(list(held)))[self.rank]
        self._copy({place: held[place] for places in mine.values() for place in places})
        self._thread = threading.Thread(target=self._run, args=(step, mine, record), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on disk. Raises what went wrong."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def saved(self) -> Path | None:
        """The checkpoint that has become whole since this was last asked, if one has. Does not wait."""
        saved, self._saved = self._saved, None
        return saved

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread:
            self._thread.join()  # its own error, if any, must not hide this one

    def _copy(self, tensors: dict[Place, Tensor]) -> None:
        """Into the buffers, which stay for the next time."""
        before, self._buffers = self._buffers, {}
        for place, tensor in tensors.items():
            buffer = before.get(place)
            if buffer is None or buffer.dtype != tensor.dtype:
                buffer = torch.empty(place.size, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[place] = buffer.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _run(self, step: int, mine: dict[str, list[Place]], record: dict[str, Any]) -> None:
        aside = self.output_dir / f".checkpoint-{step}.writing"
        try:
            self._saved = self._write(step, aside, mine, record)
        except BaseException as error:
            self._error = error
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)

    def _write(self, step: int, aside: Path, mine: dict[str, list[Place]], record: dict[str, Any]) -> Path:
        def prepare() -> None:
            if self.rank == 0:
                remove_strays(self.output_dir, ("writing", "deleting"))
                aside.mkdir(parents=True)

        def write() -> dict[str, int]:
            for name, places in mine.items():
                write_pieces(aside / name, {place: self._buffers[place] for place in places})
                _sync(aside / name)
            return {name: (aside / name).stat().st_size for name in mine}

        self._together(step, prepare)
        sizes = {name: size for part in self._together(step, write) for name, size in sorted(part.items())}
        content = {"format": FORMAT, "step": step, **record, "files": dict(sorted(sizes.items()))}

        def commit() -> None:
            if self.rank == 0:
                put_in_place(aside, self.output_dir / f"checkpoint-{step}", content)
                keep_latest(self.output_dir, self.limit, step)

        self._together(step, commit)
        return self.output_dir / f"checkpoint-{step}"

    def _together(self, step: int, action: Callable[[], Any]) -> list[Any]:
        """What it returned on each process, once all are through. Fails on all where it failed on one."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # the others must hear of it
            failure = error
        outcomes = self.exchange((result, failure and (str(failure) or repr(failure))))
        if failure and not isinstance(failure, (OSError, SafetensorError, UserError)):
            raise failure  # a mistake of ours
        for rank, (_, message) in enumerate(outcomes):
            if message:
                by = f" by process {rank}" if len(outcomes) > 1 else ""
                raise UserError(
                    f"--output_dir {self.output_dir}: checkpoint-{step} could not be written{by} ({message}); the "
                    "checkpoints before it are as they were. Mend that, and run the same command again"
                )
        return [result for result, _ in outcomes]


def save(output_dir: Path, step: int, tensors: Groups, record: dict[str, Any]) -> Path:
    """Write `checkpoint-{step}` here and now; `tensors` as for a `Saver`."""
    with Saver(output_dir) as saver:
        saver.save(step, tensors, record)
    return output_dir / f"checkpoint-{step}"


def put_in_place(aside: Path, folder: Path, record: dict[str, Any]) -> None:
    """Add the record to synced files and give their folder its name; one that has that name goes away."""
    for name, size in record["files"].items():
        if not (aside / name).exists() or (aside / name).stat().st_size != size:
            raise UserError(f"{aside / name} is not seen by process 0: all processes must share this disk")
    (aside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(aside / RECORD)
    _sync(aside)
    if folder.exists():  # a run that went back to an earlier checkpoint comes by again
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)  # `folders` finds it there
    aside.rename(folder)
    _sync(folder.parent)
    remove_strays(folder.parent, ("replaced",))


def remove_strays(output_dir: Path, kinds: tuple[str, ...]) -> None:
    """What kills left behind."""
    for kind in kinds:
        for path in output_dir.glob(f".checkpoint-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def keep_latest(output_dir: Path, limit: int | None, saved: int | None = None) -> None:
    """Delete what comes before the latest `limit` whole checkpoints, but never that of step `saved`."""
    if not limit:
        return
    found = folders(output_dir)
    whole = [folder for folder in found if is_whole(folder)]
    if len(whole) <= limit:
        return
    for folder in found[: found.index(whole[-limit])]:
        if folder.name != f"checkpoint-{saved}":
            aside = folder.with_name(f".{folder.name}.deleting")  # never half a checkpoint under a checkpoint's name
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            shutil.rmtree(aside)


def is_whole(folder: Path) -> bool:
    try:
        read(folder)
    except UserError:
        return False
    return True


def _sync(path: Path) -> None:
    """A file's errors are raised: they may be the only sign of a disk that did not take it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)  # some file systems cannot sync a folder
    finally:
        os.close(descriptor)


# The optimizer


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that AdamW's first step would begin with, in the parameter's layout.

    So a checkpoint can be loaded into it; and each has all of the state, also of parameters that got no gradient yet.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """The optimizer's state, the tensors themselves, called `exp_avg/unet.pos_embed` and so on."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
