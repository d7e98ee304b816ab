"""A run's checkpoints: looked at before they are written, and gone on from."""

import time
from pathlib import Path

from torch import Tensor

from uvit.checkpoint.folder import Checkpoint, check_command, latest_checkpoint, read_checkpoint
from uvit.checkpoint.layout import from_checkpoint_layout, to_checkpoint_layout
from uvit.checkpoint.saver import Saver, all_gather_channel
from uvit.distributed.ops import any_of, broadcast, differing_replicas
from uvit.errors import UserError
from uvit.train.checks import differing_fingerprint
from uvit.train.optimizer import checksum, training_state
from uvit.train.setup import Run

MAX_NAMED_TENSORS = 3  # of tensors that are not as they should be


class Checkpointer:
    """Writes a run's checkpoints while it goes on; leaving it as a context manager waits for the last one.

    Nothing is written, and UserError raised in all processes, where replicas differ or the averaged weights stand
    still: what was saved before is then the last that can be trusted.
    """

    def __init__(self, run: Run):
        self.run = run
        limit = run.config.save_total_limit
        self.saver = Saver(run.output_dir, limit, run.world.rank, all_gather_channel(run.world))
        self.before = self._bits()
        self.begun: int | None = None  # step of the last checkpoint

    def save(self) -> None:
        """Begin to write checkpoint-{step}. Waits for the one before, if it is still being written."""
        run = self.run
        state = run_state(run)
        self._check_replicas(state)
        self._check_average()
        if not run.guards.skipped_in_a_row:
            run.guards.good = f"checkpoint-{run.step}"
        self.saver.save(
            run.step, {name: to_checkpoint_layout(tensors, run.world) for name, tensors in state.items()}, run.record()
        )
        run.checkpoint, self.begun = run.output_dir / f"checkpoint-{run.step}", run.step

    def save_and_wait(self) -> float:
        """Until checkpoint-{step} is whole, whether it was begun before or not. Returns the seconds that it took."""
        started = time.perf_counter()
        if self.begun != self.run.step:
            self.save()
        self.saver.wait()
        return time.perf_counter() - started

    def saved(self) -> Path | None:
        """The checkpoint that has become whole since this was last asked, if one has."""
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
                f"{self._not_written()}: processes that should hold the same differ in {first} ({len(names)} of "
                f"{len(tensors)} tensors); {self._last()}. Run the same command again, and if it comes again, look for "
                "faulty hardware"
            )

    def _check_average(self) -> None:
        """The average follows the weights, however slowly."""
        if self.run.ema is None:
            return
        before, self.before = self.before, self._bits()
        moved, followed = (any_of(a != b, self.run.world) for a, b in zip(before, self.before, strict=True))
        if moved and not followed:
            raise UserError(
                f"{self._not_written()}: the weights have changed, and their average has not changed in a single bit; "
                f"{self._last()}. Is --ema_decay {self.run.config.ema_decay} too near 1?"
            )

    def _bits(self) -> tuple[int, int]:
        """Of this process's part of the weights and of their average."""
        return (checksum(self.run.master_model), checksum(self.run.ema.model)) if self.run.ema else (0, 0)

    def _not_written(self) -> str:
        return f"--output_dir {self.run.output_dir}: checkpoint-{self.run.step} is not written"

    def _last(self) -> str:
        last = self.run.checkpoint
        return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"


def run_state(run: Run) -> dict[str, dict[str, Tensor]]:
    return training_state(run.master_model, run.optimizer, run.ema)


def resume(run: Run) -> None:
    """Put the run where its checkpoint was, if there is one, whatever the processes that wrote it."""
    name = run.config.resume_from_checkpoint
    if name is None or name == "latest":
        latest = latest_checkpoint(run.output_dir) if run.world.is_main else None
        found = broadcast(latest, run.world)
    else:
        found = read_checkpoint(Path(name))
    if found is None:
        if name == "latest":
            raise UserError(f"--resume_from_checkpoint latest: there is no whole checkpoint in {run.output_dir}")
        return
    check_same_run(run, found)
    if run.ema and not found.files("ema"):
        raise UserError(f"{found.folder}: was saved with --use_ema False; go on so, or start afresh")
    restore(run, found)
    print(f"resumed {found.folder}: step {run.step} of {run.max_steps}")


def restore(run: Run, found: Checkpoint) -> None:
    for group, tensors in run_state(run).items():
        targets = to_checkpoint_layout(tensors, run.world)
        found.load_into(group, targets)
        from_checkpoint_layout(tensors, targets, run.world)
    run.precision.publish()
    run.precision.scale.load_state_dict(found.record["loss_scale"])
    run.guards.load_state_dict(found.record["guards"])
    run.step, run.samples, run.checkpoint = found.step, found.record["samples"], found.folder


def check_same_run(run: Run, found: Checkpoint) -> None:
    """Refuse a checkpoint of another model; tell of flags that differ."""
    check_command(found, "uvit train")
    ours, theirs = run.record(), found.record
    for key in ("unet_config", "text_encoder_config", "prediction_type", "latent_scale", "timestep_labels"):
        if ours[key] != theirs[key]:
            raise UserError(
                f"{found.folder}: its {key} is {theirs[key]}, this run's {ours[key]}; choose another --output_dir or "
                "pass --overwrite_output_dir to start afresh"
            )
    key_of = {"VAE": "vae_sha256", "text encoder": "text_encoder_sha256", "tokenizer": "tokenizer_sha256"}
    made_by, was_made_by = ({what: record.get(key) for what, key in key_of.items()} for record in (ours, theirs))
    if other := differing_fingerprint(made_by, was_made_by):
        what, both = other
        raise UserError(
            f"--feature_path {run.config.feature_path}: was made by another {what} than the features that "
            f"{found.folder} was trained on ({both}); go on with those, or choose another --output_dir"
        )
    if bool(theirs["loss_scale"]) != bool(ours["loss_scale"]):
        raise UserError(
            f"{found.folder}: was{'' if theirs['loss_scale'] else ' not'} trained with --fp16; go on so or start afresh"
        )
    for sentence in found.changed_flags(run.config).values():
        print(sentence)
