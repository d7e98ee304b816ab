"""A run's checkpoints: check and save them, and resume from them."""

import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from uvit.checkpoint.averages import delete_snapshots_after
from uvit.checkpoint.folder import BEST, Checkpoint, check_command, checkpoint_folders, keep_latest, latest_checkpoint
from uvit.checkpoint.layout import from_checkpoint_layout, to_checkpoint_layout
from uvit.checkpoint.saver import Saver, all_gather_channel
from uvit.conventions import Conventions
from uvit.distributed.ops import any_of, differing_replicas, on_main
from uvit.errors import UserError, differences
from uvit.io import write_json
from uvit.train.branch import (
    Later,
    later_than,
    latest_of_branch,
    named_checkpoint,
    read_named,
    read_together,
    set_aside,
)
from uvit.train.checks import differing_fingerprints
from uvit.train.ema import checksum
from uvit.train.epochs import EpochRange, extend_epochs
from uvit.train.optimizer import training_state
from uvit.train.schedule import describe_resume
from uvit.train.setup import Run, plan_steps
from uvit.weights.text_encoder import comparable_text_config

MAX_NAMED_TENSORS = 3  # in an error message


class Checkpointer:
    """Writes a run's checkpoints while training continues. As a context manager, it waits for the last one.

    If replicas differ, or the EMA weights do not follow the weights, nothing is written and all processes raise
    UserError. The checkpoint before is then the last one to be trusted.
    """

    def __init__(self, run: Run):
        self.run = run
        limit = run.config.save_total_limit
        self.saver = Saver(run.output_dir, limit, run.world.rank, all_gather_channel(run.world))
        run.before_update = self.saver.wait_for_copy
        self.checksums, self.checked_step = self._checksums(), run.step
        self.started_step: int | None = None  # of the last checkpoint

    def save(self, keep: Collection[str] = ()) -> None:
        """Start to write checkpoint-{step}. Wait for the checkpoint before it, if it is not complete yet.

        --save_total_limit then deletes old ones, except `keep` and those that are `needed`.
        Its tensors are copied during the next step, which waits for that with its update (`run.before_update`).
        """
        run = self.run
        state = run_state(run)
        self._check_replicas(state)
        self._check_ema()
        if not run.guards.skipped_in_a_row:
            run.guards.last_good_checkpoint = f"checkpoint-{run.step}"
        tensors = {name: to_checkpoint_layout(group, run.world) for name, group in state.items()}
        self.saver.start(run.step, tensors, run.record(), keep={*needed(run), *keep})
        run.checkpoint, self.started_step = run.output_dir / f"checkpoint-{run.step}", run.step

    def save_and_wait(self, keep: Collection[str] = ()) -> float:
        """Save checkpoint-{step}, unless started already, and wait until it is complete. Returns the seconds."""
        started = time.perf_counter()
        if self.started_step != self.run.step:
            self.save(keep)
        self.saver.wait()
        return time.perf_counter() - started

    def save_best(self, best: dict[str, Any]) -> None:
        """Save this step as the best so far, and wait. best.json names it then; the one before may be pruned."""
        before, self.run.best = self.run.best, best
        self.save_and_wait(keep=[before["checkpoint"]] if before else [])

        def name_best() -> None:
            write_json(self.run.output_dir / BEST, best)
            keep_latest(self.run.output_dir, self.run.config.save_total_limit, needed(self.run))

        on_main(name_best, self.run.world)

    def saved(self) -> Path | None:
        """The checkpoint that has become complete since the last call, if there is one."""
        return self.saver.saved()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error: object) -> None:
        self.saver.__exit__(*error)  # type: ignore[arg-type]

    def _check_replicas(self, state: dict[str, dict[str, Tensor]]) -> None:
        tensors = {f"{kind}/{name}": t for kind in ("weights", "ema") for name, t in state.get(kind, {}).items()}
        if names := differing_replicas(tensors, self.run.world):
            first = ", ".join(names[:MAX_NAMED_TENSORS]) + (", ..." if len(names) > MAX_NAMED_TENSORS else "")
            raise UserError(
                f"{self._not_written()}: processes hold different values of {first} ({len(names)} of {len(tensors)} "
                f"tensors), which should be equal; {self._last()}. Run the same command again. If this happens again, "
                "check the hardware"
            )

    def _check_ema(self) -> None:
        """The EMA weights must follow the weights, however slowly."""
        if self.run.ema is None:
            return
        update_steps, last, self.checked_step = self.run.ema.update_steps, self.checked_step, self.run.step
        if self.run.step // update_steps == last // update_steps:
            return  # no update was due
        before, self.checksums = self.checksums, self._checksums()
        changed = [any_of(old != new, self.run.world) for old, new in zip(before, self.checksums, strict=True)]
        weights_changed, ema_changed = changed
        if weights_changed and not ema_changed:
            raise UserError(
                f"{self._not_written()}: the weights have changed, but not a single bit of the EMA weights has; "
                f"{self._last()}. Is --ema_decay {self.run.ema.decay:g} too close to 1?"
            )

    def _checksums(self) -> tuple[int, int]:
        """Of this process's part of the weights and of the EMA weights."""
        return (checksum(self.run.master_model), checksum(self.run.ema.model)) if self.run.ema else (0, 0)

    def _not_written(self) -> str:
        return f"--output_dir {self.run.output_dir}: checkpoint-{self.run.step} is not written"

    def _last(self) -> str:
        last = self.run.checkpoint
        return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"


def needed(run: Run) -> set[str]:
    """The checkpoints that are never pruned: those to resume from again and to roll back to, and the best."""
    names = (run.resumed_from, run.guards.last_good_checkpoint, run.best and run.best["checkpoint"])
    return {name for name in names if name}


def run_state(run: Run) -> dict[str, dict[str, Tensor]]:
    return training_state(run.master_model, run.optimizer, run.ema)


def resume(run: Run) -> None:
    """Restore the checkpoint that the run resumes from, if there is one, from any number of processes."""
    world, name = run.world, run.config.resume_from_checkpoint
    later = Later()
    if name is None or name == "latest":
        checkpoint = latest_checkpoint(
            run.output_dir,
            read=lambda folder: read_together(folder, world),
            find=lambda folder: on_main(lambda: checkpoint_folders(folder), world),
        )
        if checkpoint is None:
            if name == "latest":
                print(f"--resume_from_checkpoint latest: {run.output_dir} has no checkpoint yet; starts at step 0")
            return
        run.resumed_from = checkpoint.record.get("resumed_from")
    else:
        target, run.resumed_from = on_main(lambda: named_checkpoint(name, run.output_dir), world)
        checkpoint = latest_of_branch(run) or read_named(name, target, world)
        if checkpoint.folder == target:
            later = on_main(lambda: later_than(checkpoint, run), world)
    check_same_run(run, checkpoint)
    if run.ema and not checkpoint.files("ema"):
        raise UserError(
            f"{checkpoint.folder}: was saved with --use_ema False; pass --use_ema False, or choose another --output_dir"
        )
    restore(run, checkpoint)

    def tidy_up() -> None:
        set_aside(run, later)
        # A kill may have come before that. Later ones may be damaged, so this one stays until the next is saved.
        keep_latest(run.output_dir, run.config.save_total_limit, {checkpoint.folder.name, *needed(run)})
        delete_snapshots_after(run.output_dir, run.step)

    on_main(tidy_up, world)
    for sentence in describe_resume(run, checkpoint):
        print(sentence)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the run. The number of processes that wrote it does not matter."""
    for group, tensors in run_state(run).items():
        targets = to_checkpoint_layout(tensors, run.world)
        checkpoint.load_into(group, targets)
        from_checkpoint_layout(tensors, targets, run.world)
    run.precision.update_compute_model()
    run.precision.scale.load_state_dict(checkpoint.record["loss_scale"])
    run.guards.load_state_dict(checkpoint.record["guards"])
    run.step, run.samples, run.checkpoint = checkpoint.step, checkpoint.record["samples"], checkpoint.folder
    size = run.features.num_samples
    # Checkpoints of version 0.1.0 do not have their epochs: they have to be of this data.
    ranges = [EpochRange(*each) for each in checkpoint.record.get("epochs", [(0, 0, size)])]
    run.batches.epochs = extend_epochs(ranges, run.samples, size)
    plan_steps(run)
    run.best = checkpoint.record.get("best")


def check_same_run(run: Run, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint is of another model or of other features. Prints the flags that differ."""
    check_command(checkpoint, "uvit train")
    before, now = fixed_settings(checkpoint.record), fixed_settings(run.record())
    if before["train_text_encoder"] != now["train_text_encoder"]:
        del before["text_encoder_config"], now["text_encoder_config"]
    model = differences(before, now)
    features = differing_fingerprints(feature_fingerprints(checkpoint.record), feature_fingerprints(run.record()))
    if features or model:
        how = ["with another model, precision, optimizer or EMA"] if model else []
        if features:
            how.append(f"on features by other encoders than those of --feature_path {run.config.feature_path}")
        raise UserError(
            f"{checkpoint.folder}: was trained {' and '.join(how)}; pass the same again to resume, "
            "choose another --output_dir, or pass --overwrite_output_dir to start from scratch",
            [*model.values(), *features],
        )
    for sentence in checkpoint.changed_flags(run.config).values():
        print(sentence)


def fixed_settings(record: dict[str, Any]) -> dict[str, Any]:
    """What may not change within a run, from its record. What an earlier version did not record is left out."""
    config, conventions = record["config"], asdict(Conventions.recorded(record))
    return {
        "unet_config": record["unet_config"],
        **{name: value for name, value in conventions.items() if value is not None},
        "text_encoder_config": comparable_text_config(record["text_encoder_config"]),
        "train_text_encoder": record["text_encoder_config"] is not None,
        "fp16": bool(record["loss_scale"]),
        "optim": config.get("optim", "adamw"),
        "ema_lengths": list(config.get("ema_lengths", [])),
        "align": config.get("align", "none"),
    }


def feature_fingerprints(record: dict[str, Any]) -> dict[str, str | None]:
    """Of what made the features of a run."""
    names = {"VAE": "vae", "text encoder": "text_encoder", "tokenizer": "tokenizer", "teacher": "teacher"}
    return {what: record.get(f"{name}_sha256") for what, name in names.items()}
