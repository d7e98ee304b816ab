"""Checkpoints on disk: whole or not at all.

A checkpoint is a folder `checkpoint-{step}`: safetensors files, and `uvit.json`, which says in readable form what it is
(config, networks, step, samples seen, versions) and how large each file is. It is written under another name, synced
and renamed, so a kill at any moment leaves the last whole one. Where several processes train, each writes what it
holds (`uvit.checkpoint.tensors`), and the folder gets its name once all of them have.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from uvit.checkpoint.folder import CHECKPOINT_FORMAT, RECORD, checkpoint_folders, is_whole
from uvit.checkpoint.tensors import Groups, SliceKey, assign_writers, slices_by_key, write_slices
from uvit.errors import UserError
from uvit.io import sync_path, write_json

# Hands over an object and gets those of all processes, in the order of their ranks.
AllGather = Callable[[Any], list[Any]]


# Writing


def single_process(value: Any) -> list[Any]:
    """The `Exchange` of a single process."""
    return [value]


class Saver:
    """Saves a run's checkpoints while training goes on.

    `save` only copies the tensors; a thread writes them. What goes wrong there is raised by the next `save` or `wait`,
    on all processes: a UserError where the disk did not take it. All processes of a run make one, and call `save` and
    `wait` alike; `exchange` must not be used by anything else. Use it as a context manager: leaving it waits.
    """

    def __init__(self, output_dir: Path, limit: int | None = None, rank: int = 0, exchange: AllGather = single_process):
        """limit: how many checkpoints to keep, as `--save_total_limit` asks. None: all."""
        self.output_dir, self.limit, self.rank, self.exchange = output_dir, limit, rank, exchange
        self._buffers: dict[SliceKey, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Path | None = None

    def save(self, step: int, tensors: Groups, record: dict[str, Any]) -> None:
        """Begin to write `checkpoint-{step}`, after waiting for the one before.

        `tensors` maps the groups weights, ema and optimizer to names to what this process holds. They may change as
        soon as this returns. `record` says what the run is; that of rank 0 counts.
        """
        self.wait()
        held = slices_by_key(tensors)
        mine = assign_writers(self.exchange(list(held)))[self.rank]
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

    def _copy(self, tensors: dict[SliceKey, Tensor]) -> None:
        """Into the buffers, which stay for the next time."""
        before, self._buffers = self._buffers, {}
        for place, tensor in tensors.items():
            buffer = before.get(place)
            if buffer is None or buffer.dtype != tensor.dtype:
                buffer = torch.empty(place.size, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[place] = buffer.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _run(self, step: int, mine: dict[str, list[SliceKey]], record: dict[str, Any]) -> None:
        aside = self.output_dir / f".checkpoint-{step}.writing"
        try:
            self._saved = self._write(step, aside, mine, record)
        except BaseException as error:
            self._error = error
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)

    def _write(self, step: int, aside: Path, mine: dict[str, list[SliceKey]], record: dict[str, Any]) -> Path:
        def prepare() -> None:
            if self.rank == 0:
                clean_up(self.output_dir, ("writing", "deleting"))
                aside.mkdir(parents=True)

        def write() -> dict[str, int]:
            for name, places in mine.items():
                write_slices(aside / name, {place: self._buffers[place] for place in places})
                sync_path(aside / name)
            return {name: (aside / name).stat().st_size for name in mine}

        self._together(step, prepare)
        sizes = {name: size for part in self._together(step, write) for name, size in sorted(part.items())}
        content = {"format": CHECKPOINT_FORMAT, "step": step, **record, "files": dict(sorted(sizes.items()))}

        def commit() -> None:
            if self.rank == 0:
                commit_folder(aside, self.output_dir / f"checkpoint-{step}", content)
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


def commit_folder(aside: Path, folder: Path, record: dict[str, Any]) -> None:
    """Add the record to synced files and give their folder its name; one that has that name goes away."""
    for name, size in record["files"].items():
        if not (aside / name).exists() or (aside / name).stat().st_size != size:
            raise UserError(f"{aside / name} is not seen by process 0: all processes must share this disk")
    write_json(aside / RECORD, record)
    sync_path(aside)
    if folder.exists():  # a run that went back to an earlier checkpoint comes by again
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)  # `folders` finds it there
    aside.rename(folder)
    sync_path(folder.parent)
    clean_up(folder.parent, ("replaced",))


def clean_up(output_dir: Path, kinds: tuple[str, ...]) -> None:
    """What kills left behind."""
    for kind in kinds:
        for path in output_dir.glob(f".checkpoint-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def keep_latest(output_dir: Path, limit: int | None, saved: int | None = None) -> None:
    """Delete what comes before the latest `limit` whole checkpoints, but never that of step `saved`."""
    if not limit:
        return
    found = checkpoint_folders(output_dir)
    whole = [folder for folder in found if is_whole(folder)]
    if len(whole) <= limit:
        return
    for folder in found[: found.index(whole[-limit])]:
        if folder.name != f"checkpoint-{saved}":
            aside = folder.with_name(f".{folder.name}.deleting")  # never half a checkpoint under a checkpoint's name
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            shutil.rmtree(aside)
