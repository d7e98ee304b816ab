"""`uvit train`: set up or resume, step, log, save, and at the end a pipeline folder."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from uvit import checkpoint
from uvit.config.train import TrainConfig
from uvit.config_file import write_yaml
from uvit.convert.export import export_checkpoint, exported_facts
from uvit.data.features import OldLayout
from uvit.data.loader import load
from uvit.data.types import Batch
from uvit.distributed.mesh import Degrees, World, start
from uvit.distributed.mesh import stop as leave
from uvit.distributed.ops import any_of, barrier, from_main
from uvit.distributed.saving import exchange_channel
from uvit.distributed.state import canonical, load_canonical
from uvit.errors import UserError
from uvit.train.checks import difference
from uvit.train.estimate import describe
from uvit.train.metrics import Metrics, Silent, Timed, logs_folder
from uvit.train.preview import load_preview_vae, preview
from uvit.train.setup import Run, set_up
from uvit.train.step import StepResult, train_step
from uvit.train.validate import is_due, validate


def train(config: TrainConfig) -> int:
    """Train to the last step, or until Ctrl-C or SIGTERM. Returns the exit status."""
    for sentence in config.not_needed():
        print(sentence)
    if config.dry_run:
        print(describe(set_up(config, Path(config.output_dir))))
        return 0
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    world = start(degrees, config.device)
    try:
        # What the main process says is true of all.
        with contextlib.nullcontext() if world.is_main else contextlib.redirect_stdout(None):
            return train_together(config, world)
    finally:
        leave(world)


def train_together(config: TrainConfig, world: World) -> int:
    """What every process of a run does."""
    output_dir = Path(config.output_dir)
    run = set_up(config, output_dir, world)
    if config.overwrite_output_dir and world.is_main:
        set_aside(output_dir)
    barrier(world)
    resume(run)
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(dataclasses.replace(config, overwrite_output_dir=False), output_dir / "config.yaml")
    if run.step >= run.max_steps:
        print(f"{output_dir}: all {run.max_steps} steps are done")
        status = 0
    else:
        with stop_signals() as signals:
            status = train_to_the_end(run, signals)
    if status == 0 and world.is_main:
        write_pipeline(run)
    return status


def train_to_the_end(run: Run, stop: "Stop") -> int:
    config = run.config
    vae = load_preview_vae(run)
    old_layout = isinstance(run.features, OldLayout)
    metrics: Metrics | Silent = Silent()
    if run.world.is_main:
        metrics = Metrics(config, run.output_dir, run.step, run.max_steps, run.samples_per_step, old_layout)
    batches = Timed(load_batches(run))
    first_step, skipped_in_a_row = run.step, 0
    saved: int | None = None
    try:
        with profiler(config, run) as profile, open_saver(run) as saver:
            while run.step < run.max_steps and not any_of(bool(stop.signal), run.world):
                started = time.perf_counter()
                result = train_step(run, batches)
                seconds = time.perf_counter() - started

                skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
                record = record_of(run, result, seconds, batches.seconds())
                metrics.step(record | (validate(run) if is_due(run) else {}))
                if skipped_in_a_row == config.max_nonfinite_steps:
                    raise UserError(not_finite(run, skipped_in_a_row))
                if vae and run.step % config.image_logging_steps == 0:
                    metrics.image("preview", preview(run, vae), run.step)
                if run.step % config.save_steps == 0:
                    saved = save(run, saver, metrics)
                if folder := saver.saved():
                    metrics.say(f"saved {folder}")
                profile(run.step - first_step)
            if saved != run.step:
                save(run, saver, metrics)
            saver.wait()
            metrics.say(f"saved {saver.saved() or run.output_dir / f'checkpoint-{run.step}'}")
        if config.benchmark:
            metrics.say(f"steady state: {metrics.throughput()}")
    finally:
        metrics.close()
    if run.step < run.max_steps:
        print(f"stopped at step {run.step} of {run.max_steps}, saved; run the same command again to go on")
        return 128 + (stop.signal or signal.SIGTERM)  # the signal may have reached another process alone
    return 0


def load_batches(run: Run) -> Iterator[Batch]:
    """Those that this process has to compute, from the run's sample counter on."""
    world, num_batches = run.world, (run.max_steps - run.step) * run.config.gradient_accumulation_steps
    run.batches.first_sample = run.samples
    share = range(world.data_rank, num_batches * world.num_data_ranks, world.num_data_ranks)
    return load(run.batches, share, run.config.dataloader_num_workers, run.device)


def record_of(run: Run, result: StepResult, seconds: float, data_seconds: float) -> dict[str, float | int | None]:
    return {
        "step": run.step,
        "samples": run.samples,
        "loss": result.loss if result.finite else None,
        "grad_norm": result.grad_norm if result.finite else None,
        "lr": result.lr,
        "skipped": int(not result.finite),
        "seconds": round(seconds, 6),
        "data_seconds": round(data_seconds, 6),  # of these, spent waiting for batches
    }


def not_finite(run: Run, count: int) -> str:
    last = checkpoint.latest(run.output_dir)
    saved = f"the last checkpoint is {last.folder}" if last else "there is no checkpoint yet"
    return (
        f"the loss or gradient was not finite for {count} steps in a row, up to step {run.step}, and nothing was "
        f"updated; {saved}. Try a lower --learning_rate than {run.config.learning_rate}, --max_grad_norm 1 or --bf16 "
        "instead of --fp16"
    )


# Checkpoints


def open_saver(run: Run) -> checkpoint.Saver:
    world = run.world
    return checkpoint.Saver(run.output_dir, run.config.save_total_limit, world.rank, exchange_channel(world))


def save(run: Run, saver: checkpoint.Saver, metrics: Metrics | Silent) -> int:
    """Begin to write checkpoint-{step}, while training goes on; returns the step."""
    metrics.flush()
    groups = {name: canonical(tensors, run.world) for name, tensors in state_of(run).items()}
    saver.save(run.step, groups, run.record())
    return run.step


def state_of(run: Run) -> dict[str, dict[str, Tensor]]:
    """All that changes from step to step, by the names of a checkpoint's files."""
    checkpoint.prepare_optimizer(run.optimizer)
    state = {
        "weights": run.networks.state_dict(),
        "optimizer": checkpoint.flatten_optimizer(run.optimizer, run.parameter_names()),
    }
    return state | ({"ema": run.ema.model.state_dict()} if run.ema else {})


def resume(run: Run) -> None:
    """Put the run where its checkpoint was, if there is one, whatever the processes that wrote it."""
    name = run.config.resume_from_checkpoint
    if name is None or name == "latest":
        latest = checkpoint.latest(run.output_dir) if run.world.is_main else None
        found = from_main(latest, run.world)
    else:
        found = checkpoint.read(Path(name))
    if found is None:
        if name == "latest":
            raise UserError(f"--resume_from_checkpoint latest: there is no whole checkpoint in {run.output_dir}")
        return
    check_same_run(run, found)
    if run.ema and not found.files("ema"):
        raise UserError(f"{found.folder}: was saved with --use_ema False; go on so, or start afresh")
    for group, tensors in state_of(run).items():
        targets = canonical(tensors, run.world)
        found.load_into(group, targets)
        load_canonical(tensors, targets, run.world)
    run.precision.publish()
    run.precision.scale.load_state_dict(found.record["loss_scale"])
    run.step, run.samples = found.step, found.record["samples"]
    print(f"resumed {found.folder}: step {run.step} of {run.max_steps}")


def check_same_run(run: Run, found: checkpoint.Checkpoint) -> None:
    """Refuse a checkpoint of another model; tell of flags that differ."""
    ours, theirs = run.record(), found.record
    for key in ("unet_config", "text_encoder_config", "prediction_type", "latent_scale"):
        if ours[key] != theirs[key]:
            raise UserError(
                f"{found.folder}: its {key} is {theirs[key]}, this run's {ours[key]}; choose another --output_dir or "
                "pass --overwrite_output_dir to start afresh"
            )
    key_of = {"VAE": "vae_sha256", "text encoder": "text_encoder_sha256", "tokenizer": "tokenizer_sha256"}
    made_by, was_made_by = ({what: record.get(key) for what, key in key_of.items()} for record in (ours, theirs))
    if other := difference(made_by, was_made_by):
        what, both = other
        raise UserError(
            f"--feature_path {run.config.feature_path}: was made by another {what} than the features that "
            f"{found.folder} was trained on ({both}); go on with those, or choose another --output_dir"
        )
    if bool(theirs["loss_scale"]) != bool(ours["loss_scale"]):
        raise UserError(
            f"{found.folder}: was{'' if theirs['loss_scale'] else ' not'} trained with --fp16; go on so or start afresh"
        )
    quiet = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm"}
    before = theirs["config"]
    for key, value in dataclasses.asdict(run.config).items():
        if key not in quiet and key in before and before[key] != value:
            print(f"--{key} was {before[key]} and is now {value}")


def set_aside(output_dir: Path) -> None:
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    kept = next(p for i in range(1, 10000) if not (p := output_dir.with_name(f"{output_dir.name}.old{i}")).exists())
    output_dir.rename(kept)
    print(f"--overwrite_output_dir: what was in {output_dir} is now in {kept}")


def write_pipeline(run: Run) -> None:
    """OUTPUT_DIR/pipeline from the last checkpoint; without the encoders, say how to do it later."""
    last = checkpoint.folders(run.output_dir)[-1]
    goal = run.output_dir / "pipeline"
    if exported_facts(goal).get("step") == run.step:
        print(f"{goal} is there already")
        return
    try:
        export_checkpoint(last, goal, replace=True)
        print(f'wrote {goal}; try: uvit sample --pipeline {goal} "..."')
    except UserError as error:
        print(f"trained, but no pipeline was written: {error}. Then: uvit convert {last} {goal}")


# Ctrl-C, SIGTERM, the profiler


class Stop:
    """The signal that asked to stop, or 0. The second one stops at once."""

    signal = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this step (again: at once, without saving)", flush=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def profiler(config: TrainConfig, run: Run):  # type: ignore[no-untyped-def]  # yields a function of the steps done
    """Between the two steps of --profiler_options, a trace that chrome://tracing and Perfetto open."""
    steps = config.profiled_steps()
    if steps is None or not run.world.is_main:
        yield lambda done: None
        return
    profile = torch.profiler.profile()

    def after(done: int) -> None:
        if done == steps[0]:
            profile.start()
        if done == steps[1] + 1:
            profile.stop()
            profile.export_chrome_trace(str(logs_folder(config, run.output_dir) / f"trace-{steps[0]}-{steps[1]}.json"))

    yield after
