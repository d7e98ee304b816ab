"""Saves checkpoints in the background, by one process or by several together.

`Saver.start` starts a thread, which copies the tensors and does the rest, in three phases that all processes pass
together (`Saver._write`):

1. Each process copies its tensors. Process 0 makes the hidden folder `.checkpoint-{step}.writing`.
2. Each process writes and syncs its own slices (`uvit.checkpoint.tensors`).
3. Process 0 commits: `uvit.checkpoint.folder.commit_folder` adds the record and renames the folder.

If a phase fails on one process, it fails on all, and earlier checkpoints stay as they were.
"""

import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from uvit.checkpoint.folder import CHECKPOINT_FORMAT, clean_up, commit_folder, keep_latest
from uvit.checkpoint.tensors import Groups, SliceKey, assign_writers, slices_by_key, write_slices
from uvit.distributed.mesh import START_TIMEOUT, World
from uvit.errors import UserError
from uvit.io import let_others_read, sync_path

# Takes this process's object and returns those of all processes, in the order of their ranks.
AllGather = Callable[[Any], list[Any]]


def single_process(value: Any) -> list[Any]:
    """The `AllGather` of a single process."""
    return [value]


def all_gather_channel(world: World) -> AllGather:
    """An `AllGather` for a `Saver` alone. All processes call this together; a single process opens nothing.

    It is a process group of its own, on the CPU, because the saver's thread uses it while training's own collectives
    run.
    """
    if not world.parallel:
        return single_process
    group = dist.new_group(backend="gloo", timeout=START_TIMEOUT)  # one process may write far longer than another

    def all_gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world.size
        dist.all_gather_object(values, value, group=group)
        return values

    return all_gather


class Saver:
    """Saves a run's checkpoints while training continues.

    All processes make one and call `start` and `wait` together. An error of the thread is raised by the next `start` or
    `wait`, on all processes: a UserError if the disk refused the files. As a context manager, it waits at the end.
    """

    def __init__(
        self, output_dir: Path, limit: int | None = None, rank: int = 0, all_gather: AllGather = single_process
    ):
        """limit: how many checkpoints to keep (`--save_total_limit`), besides those named to `start`. None: all."""
        self.output_dir, self.limit, self.rank, self.all_gather = output_dir, limit, rank, all_gather
        self._buffers: dict[SliceKey, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Path | None = None
        self._copied = threading.Event()
        self._copied.set()

    def start(self, step: int, tensors: Groups, record: dict[str, Any], keep: Collection[str] = ()) -> None:
        """Start to write `checkpoint-{step}`, after waiting for the one before.

        Args:
            tensors: group (weights, ema, optimizer) -> name -> what this process holds. The tensors must stay as they
                are until `wait_for_copy` returns; a forward and a backward pass may run meanwhile.
            record: what the run is, for `uvit.json`. Only that of rank 0 is written.
            keep: the names of checkpoints that are not deleted afterwards, however old they are.
        """
        self.wait()
        local = slices_by_key(tensors)
        files = assign_writers(self.all_gather(list(local)))[self.rank]
        wanted = {key: local[key] for keys in files.values() for key in keys}
        self._copied.clear()
        if not wanted or any(tensor.is_cuda for tensor in wanted.values()):  # a GPU copies faster than a step
            self._copy(wanted)
            wanted = {}
        self._thread = threading.Thread(
            target=self._run, args=(step, files, wanted, record, keep), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def save(self, step: int, tensors: Groups, record: dict[str, Any]) -> None:
        """The same, but the tensors may change as soon as this returns."""
        self.start(step, tensors, record)
        self.wait_for_copy()

    def wait_for_copy(self) -> None:
        """Wait until the tensors that are being saved may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises its error if there was one."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def saved(self) -> Path | None:
        """The checkpoint that was committed since the last call, or None. Does not wait."""
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
            self._thread.join()  # its own error must not hide this one

    def _copy(self, tensors: dict[SliceKey, Tensor]) -> None:
        """Copy into the buffers, which are used again by the next save."""
        try:
            before, self._buffers = self._buffers, {}
            for key, tensor in tensors.items():
                buffer = before.get(key)
                if buffer is None or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(key.size, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key] = buffer.copy_(tensor.detach(), non_blocking=True)
            for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
                torch.cuda.synchronize(device)  # which need not be the current one
        finally:
            self._copied.set()

    def _run(
        self,
        step: int,
        files: dict[str, list[SliceKey]],
        tensors: dict[SliceKey, Tensor],
        record: dict[str, Any],
        keep: Collection[str],
    ) -> None:
        aside = self.output_dir / f".checkpoint-{step}.writing"
        try:
            self._saved = self._write(step, aside, files, tensors, record, keep)
        except BaseException as error:
            self._error = error
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)

    def _write(
        self,
        step: int,
        aside: Path,
        files: dict[str, list[SliceKey]],
        tensors: dict[SliceKey, Tensor],
        record: dict[str, Any],
        keep: Collection[str],
    ) -> Path:
        folder = self.output_dir / f"checkpoint-{step}"

        def prepare() -> None:
            if tensors:
                self._copy(tensors)
            if self.rank == 0:
                clean_up(self.output_dir, ("writing", "deleting"))
                aside.mkdir(parents=True)

        def write() -> dict[str, tuple[int, str]]:
            written = {}
            for name, keys in files.items():
                sha256 = write_slices(aside / name, {key: self._buffers[key] for key in keys})
                let_others_read(aside / name)
                sync_path(aside / name)
                written[name] = (aside / name).stat().st_size, sha256
            return written

        def commit() -> None:
            if self.rank == 0:
                commit_folder(aside, folder, {"format": CHECKPOINT_FORMAT, "step": step, **record}, written)
                keep_latest(self.output_dir, self.limit, {folder.name, *keep})

        self._on_all_ranks(step, prepare)
        written = {name: facts for part in self._on_all_ranks(step, write) for name, facts in part.items()}
        self._on_all_ranks(step, commit)
        return folder

    def _on_all_ranks(self, step: int, action: Callable[[], Any]) -> list[Any]:
        """Run it on each process, wait for all, return all results. If it fails on one process, it fails on all."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # raised below, once the other processes know
            failure = error
        outcomes = self.all_gather((result, failure and (str(failure) or repr(failure))))
        if failure and not isinstance(failure, (OSError, SafetensorError, UserError)):
            raise failure  # a bug
        for rank, (_, message) in enumerate(outcomes):
            if message:
                by = f" by process {rank}" if len(outcomes) > 1 else ""
                raise UserError(
                    f"--output_dir {self.output_dir}: checkpoint-{step} could not be written{by} ({message}); earlier "
                    "checkpoints are unchanged. Fix the cause and run the same command again"
                )
        return [result for result, _ in outcomes]
