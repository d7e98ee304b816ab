"""Going back: `--resume_from_checkpoint X` starts a new branch of a run at an earlier checkpoint, or at another run's.

What a later branch left is set aside, in `OUTPUT_DIR/set-aside-1`, `-2`, ...: its checkpoints, previews and pipeline
are moved there, its logs are copied. Nothing is deleted, and `--save_total_limit` never deletes X.

The same command can be repeated after an interruption. Each checkpoint of the branch records X as `resumed_from`, so
the command finds that it has gone back already, and resumes the branch. With another flag changed, it goes back again.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from uvit.checkpoint.averages import SNAPSHOTS
from uvit.checkpoint.folder import BEST, Checkpoint, checkpoint_folders, read_best, read_checkpoint, training_facts
from uvit.distributed.mesh import World
from uvit.distributed.ops import all_gather, on_main
from uvit.errors import UserError
from uvit.io import back_up, link_or_copy, move_path
from uvit.train.metrics import logs_folder
from uvit.train.setup import Run

ASIDE = ".set-aside.writing"
LOGS = ("metrics.jsonl", "passed_over.jsonl", "events.out.tfevents.*")


@dataclass(frozen=True)
class Later:
    """What a later branch left."""

    step: int = 0  # of the checkpoint to go back to; 0: of another run, and nothing here is before it
    checkpoints: tuple[Path, ...] = ()
    has_files: bool = False


def named_checkpoint(name: str, output_dir: Path) -> tuple[Path, str]:
    """What --resume_from_checkpoint names: a path, or a checkpoint in the run's folder. -> (its folder, its origin).

    The origin is how the branch records it: its name in the run's folder, which may move, or else its whole path.
    """
    path = Path(name)
    if not path.exists() and path.name == name:
        path = output_dir / name
    return path, path.name if is_in(path, output_dir) else str(path.resolve())


def read_named(name: str, path: Path, world: World) -> Checkpoint:
    """Read the checkpoint that --resume_from_checkpoint names. Raises UserError if it is not whole."""
    try:
        return read_together(path, world)
    except UserError as error:
        folders = checkpoint_folders(path)
        hint = f"; it is a run folder: name one of its checkpoints, such as {folders[-1]}" if folders else ""
        raise UserError(f"--resume_from_checkpoint {name}: {error}{hint}") from None


def read_together(folder: Path, world: World) -> Checkpoint:
    """Read a checkpoint's record and compare its checksums: each process reads a part of the files.

    On the layout that wrote them, it is the part that the process loads. Raises UserError, in all processes, if the
    checkpoint is not whole.
    """
    checkpoint = on_main(lambda: read_checkpoint(folder), world)
    error: UserError | None = None
    try:
        checkpoint.verify(list(checkpoint.record["files"])[world.rank :: world.size])
    except UserError as found:
        error = found
    for each in all_gather(error, world):
        if each:
            raise each
    return checkpoint


def latest_of_branch(run: Run) -> Checkpoint | None:
    """The latest whole checkpoint of the branch that the same command has begun before, if there is one."""
    for folder in on_main(lambda: branch_folders(run), run.world):
        try:
            found = read_together(folder, run.world)
        except UserError as error:
            print(f"skipped: {error}")
            continue
        print(
            f"--resume_from_checkpoint {run.config.resume_from_checkpoint}: this command has gone back to it before, "
            f"and resumes at {folder.name}. To go back to it again, choose another --output_dir"
        )
        return found
    return None


def is_in(checkpoint: Path, output_dir: Path) -> bool:
    return checkpoint.resolve().parent == output_dir.resolve()


def branch_folders(run: Run) -> list[Path]:
    """The checkpoints of the branch that the same command has begun before, the latest first."""
    found = []
    for folder in reversed(checkpoint_folders(run.output_dir)):
        try:
            checkpoint = read_checkpoint(folder)
        except UserError as error:
            print(f"skipped: {error}")
            continue
        if checkpoint.record.get("resumed_from") != run.resumed_from or checkpoint.changed_flags(run.config):
            break
        found.append(folder)
    return found


def later_than(checkpoint: Checkpoint, run: Run) -> Later:
    """What the run's folder has that does not lead to this checkpoint."""
    is_here = is_in(checkpoint.folder, run.output_dir)
    step = checkpoint.step if is_here else 0
    later = [path for path in checkpoint_folders(run.output_dir) if int(re.sub(r"\D", "", path.name)) > step]
    log = logs_folder(run.config, run.output_dir) / LOGS[0]
    is_other_log = not is_here and log.exists() and first_logged_step(log) <= checkpoint.step
    has_pipeline = training_facts(run.output_dir / "pipeline").get("step", 0) > step
    return Later(step, tuple(later), has_files=bool(later) or is_other_log or has_pipeline)


def first_logged_step(log: Path) -> int:
    """Of metrics.jsonl; 0 if it cannot be read."""
    with log.open(encoding="utf-8") as file:
        try:
            return json.loads(file.readline())["step"]
        except (ValueError, KeyError, TypeError):
            return 0


def set_aside_logs(run: Run) -> None:
    """Give the logs in a --logging_dir outside OUTPUT_DIR other names: a new run writes its own."""
    logs = logs_folder(run.config, run.output_dir)
    if not logs.resolve().is_relative_to(run.output_dir.resolve()):
        for path in [logs / name for name in LOGS[:2] if (logs / name).exists()]:
            print(f"--logging_dir {logs}: the {path.name} that was there is now {back_up(path).name}")


def set_aside(run: Run, later: Later) -> None:
    """Move what a later branch left to a folder of its own. A kill may come at any time: the next call continues."""
    output_dir, aside = run.output_dir, run.output_dir / ASIDE
    if later.has_files:
        aside.mkdir(exist_ok=True)
        _set_aside_files(run, later, aside)
    for folder in reversed(later.checkpoints):  # last: as long as one is left, there is more to set aside
        move_path(folder, aside / folder.name)
    if aside.is_dir():
        number = next(i for i in range(1, 10000) if not (output_dir / f"set-aside-{i}").exists())
        move_path(aside, output_dir / f"set-aside-{number}")
        print(f"what a later branch left is now in {output_dir / f'set-aside-{number}'}")


def _set_aside_files(run: Run, later: Later, aside: Path) -> None:
    """Copy the logs, of which a part stays, or move them if no part does; move previews and the pipeline."""
    (aside / "logs").mkdir(exist_ok=True)
    logs = logs_folder(run.config, run.output_dir)
    for path in [path for pattern in LOGS for path in sorted(logs.glob(pattern))]:
        target = aside / "logs" / path.name
        if not target.exists():
            link_or_copy(path, target)
        if not later.step:
            path.unlink()
    config = run.output_dir / "config.yaml"
    if config.exists() and not (aside / config.name).exists():
        link_or_copy(config, aside / config.name)
    best = read_best(run.output_dir)
    if best and best["step"] > later.step:
        move_path(run.output_dir / BEST, aside / BEST)
    for path in sorted((run.output_dir / "previews").glob("step-*.png")):
        if int(re.sub(r"\D", "", path.stem)) > later.step:
            (aside / "previews").mkdir(exist_ok=True)
            move_path(path, aside / "previews" / path.name)
    for path in sorted((run.output_dir / SNAPSHOTS).glob("step-*.safetensors")):
        if int(path.name.split("-")[1]) > later.step:
            (aside / SNAPSHOTS).mkdir(exist_ok=True)
            move_path(path, aside / SNAPSHOTS / path.name)
    for pipeline in (run.output_dir / "pipeline", *sorted(run.output_dir.glob("pipeline-ema-*"))):
        if training_facts(pipeline).get("step", later.step) > later.step:
            move_path(pipeline, aside / pipeline.name)
