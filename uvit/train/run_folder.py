"""The folder of a run: who may write into it, starting it from scratch, and errors of the disk."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.io import back_up, write_bytes, write_yaml
from uvit.lock import LOCK, WriterLock
from uvit.train.branch import set_aside_logs
from uvit.train.metrics import logs_folder
from uvit.train.rollback import truncate_skipped_samples
from uvit.train.setup import Run

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # errors of writing only
FOLDER_ERRORS = DISK_ERRORS | {errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM}
# Files in a run's folder
TO_OVERWRITE = ".overwrite"  # torchrun is to start from scratch, and has not done so yet
OVERWRITTEN_BY = ".overwritten_by"  # the Slurm job that started from scratch: if it is requeued, it resumes


def lock_output_dir(output_dir: Path, overwrite: bool, held: contextlib.ExitStack) -> WriterLock:
    """Hold the lock of a run's folder until `held` ends. `overwrite` first gives the old folder another name.

    Raises UserError if another process holds it, OSError if the folder cannot be written.
    """
    what = f"--output_dir {output_dir}"
    there = {path.name for path in output_dir.iterdir()} if overwrite and output_dir.exists() else set()
    if there - {LOCK, TO_OVERWRITE, OVERWRITTEN_BY}:
        with WriterLock(output_dir / LOCK, what):
            aside = back_up(output_dir)
            for name in (LOCK, TO_OVERWRITE, OVERWRITTEN_BY):
                (aside / name).unlink(missing_ok=True)
            print(f"--overwrite_output_dir: what was in {output_dir} is now in {aside}")
    lock = held.enter_context(WriterLock(output_dir / LOCK, what))
    if overwrite and (job := os.environ.get("SLURM_JOB_ID")):
        write_bytes(output_dir / OVERWRITTEN_BY, job.encode())
    (output_dir / TO_OVERWRITE).unlink(missing_ok=True)
    return lock


def lock_run(run: Run, held: contextlib.ExitStack) -> None:
    """Keep other processes from writing into OUTPUT_DIR until `held` ends."""
    with disk_errors(run.config, FOLDER_ERRORS):
        run.lock = lock_output_dir(run.output_dir, is_to_overwrite(run.config), held)
        logs = logs_folder(run.config, run.output_dir)
        if not logs.resolve().is_relative_to(run.output_dir.resolve()):
            held.enter_context(WriterLock(logs / LOCK, f"--logging_dir {logs}"))


def mark_for_overwriting(config: TrainConfig) -> None:
    """Under torchrun, which may restart this command: a file in the old folder says that it is still to be overwritten.

    Once that is done, the new folder has no such file, and a restart resumes there.
    """
    folder = Path(config.output_dir)
    if config.overwrite_output_dir and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and folder.is_dir():
        with disk_errors(config, FOLDER_ERRORS):
            (folder / TO_OVERWRITE).touch()


def is_to_overwrite(config: TrainConfig) -> bool:
    """Whether --overwrite_output_dir is still to be done: torchrun and Slurm start the same command again."""
    folder = Path(config.output_dir)
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not (folder / TO_OVERWRITE).exists()
    return config.overwrite_output_dir and not is_restart and not is_requeued(folder)


def is_requeued(folder: Path) -> bool:
    """Whether Slurm has requeued this job after it started the folder's run from scratch."""
    job, mark = os.environ.get("SLURM_JOB_ID"), folder / OVERWRITTEN_BY
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and mark.is_file() and mark.read_text() == job


def prepare_folder(run: Run) -> None:
    """After the start or a resume: what is there besides the checkpoints."""
    if run.checkpoint is None:
        set_aside_logs(run)
    write_config(run)
    truncate_skipped_samples(run)


def write_config(run: Run) -> None:
    """OUTPUT_DIR/config.yaml, which runs the same training again."""
    with disk_errors(run.config, FOLDER_ERRORS):
        write_yaml(dataclasses.replace(run.config, overwrite_output_dir=False), run.output_dir / "config.yaml")


@contextlib.contextmanager
def disk_errors(config: TrainConfig, numbers: set[int]) -> Iterator[None]:
    """Turn these system errors into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
        raise cannot_write(config, error) from None


def cannot_write(config: TrainConfig, error: Exception) -> UserError:
    where = f"--output_dir {config.output_dir}" + (
        f", --logging_dir {config.logging_dir}" if config.logging_dir else ""
    )
    return UserError(f"{where}: cannot be written to ({error}); fix this and run the same command again to resume")
