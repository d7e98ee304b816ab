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

from uvit import checkpoint
from uvit.config.train import TrainConfig
from uvit.config_file import write_yaml
from uvit.convert.export import export_checkpoint, exported_step
from uvit.data.loader import load
from uvit.errors import UserError
from uvit.train.estimate import describe
from uvit.train.metrics import Metrics
from uvit.train.preview import load_preview_vae, preview
from uvit.train.setup import Run, set_up
from uvit.train.step import StepResult, train_step


def train(config: TrainConfig) -> int:
    """Train to the last step, or until Ctrl-C or SIGTERM. Returns the exit status."""
    for sentence in config.not_needed():
        print(sentence)
    output_dir = Path(config.output_dir)
    if config.dry_run:
        print(describe(set_up(config, output_dir)))
        return 0
    run = set_up(config, output_dir)
    if config.overwrite_output_dir:
        set_aside(output_dir)
    resume(run)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_yaml(dataclasses.replace(config, overwrite_output_dir=False), output_dir / "config.yaml")
    if run.step >= run.max_steps:
        print(f"{output_dir}: all {run.max_steps} steps are done")
        status = 0
    else:
        with stop_signals() as stop:
            status = train_to_the_end(run, stop)
    if status == 0:
        write_pipeline(run)
    return status


def train_to_the_end(run: Run, stop: "Stop") -> int:
    config = run.config
    vae = load_preview_vae(run)
    metrics = Metrics(config, run.output_dir, run.step, run.max_steps, run.samples_per_step)
    accumulation = config.gradient_accumulation_steps
    batches = load(
        run.batches, run.step * accumulation, run.max_steps * accumulation, config.dataloader_num_workers, run.device
    )
    first_step, skipped_in_a_row = run.step, 0
    saved: int | None = None
    try:
        with profiler(config, metrics.folder) as profile:
            while run.step < run.max_steps and not stop.signal:
                started = time.perf_counter()
                result = train_step(run, batches)
                seconds = time.perf_counter() - started

                skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
                metrics.step(record_of(run, result, seconds))
                if skipped_in_a_row == config.max_nonfinite_steps:
                    raise UserError(not_finite(run, skipped_in_a_row))
                if vae and run.step % config.image_logging_steps == 0:
                    metrics.image("preview", preview(run, vae), run.step)
                if run.step % config.save_steps == 0:
                    saved = save(run, metrics)
                profile(run.step - first_step)
        if saved != run.step:
            save(run, metrics)
        if config.benchmark:
            metrics.say(f"steady state: {metrics.throughput()}")
    finally:
        metrics.close()
    if stop.signal:
        print(f"stopped at step {run.step} of {run.max_steps}, saved; run the same command again to go on")
        return 128 + stop.signal
    return 0


def record_of(run: Run, result: StepResult, seconds: float) -> dict[str, float | int | None]:
    return {
        "step": run.step,
        "samples": run.step * run.samples_per_step,
        "loss": result.loss if result.finite else None,
        "grad_norm": result.grad_norm if result.finite else None,
        "lr": result.lr,
        "skipped": int(not result.finite),
        "seconds": round(seconds, 6),
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


def save(run: Run, metrics: Metrics) -> int:
    """Write checkpoint-{step}; returns the step."""
    metrics.flush()
    tensors = {
        "weights": run.networks.state_dict(),
        "optimizer": checkpoint.flatten_optimizer(run.optimizer, run.parameter_names()),
    }
    if run.ema:
        tensors["ema"] = run.ema.model.state_dict()
    folder = checkpoint.save(run.output_dir, run.step, tensors, run.record())
    checkpoint.keep_latest(run.output_dir, run.config.save_total_limit)
    metrics.say(f"saved {folder}")
    return run.step


def resume(run: Run) -> None:
    """Put the run where its checkpoint was, if there is one."""
    name = run.config.resume_from_checkpoint
    found = checkpoint.latest(run.output_dir) if name is None or name == "latest" else checkpoint.read(Path(name))
    if found is None:
        if name == "latest":
            raise UserError(f"--resume_from_checkpoint latest: there is no whole checkpoint in {run.output_dir}")
        return
    check_same_run(run, found)
    run.networks.load_state_dict(found.load("weights", run.device))
    run.precision.publish()
    if run.ema and "ema.safetensors" in found.record["files"]:
        run.ema.model.load_state_dict(found.load("ema", run.device))
    elif run.ema:
        raise UserError(f"{found.folder}: was saved with --use_ema False; go on so, or start afresh")
    checkpoint.restore_optimizer(run.optimizer, run.parameter_names(), found.load("optimizer", run.device))
    run.precision.scaler.load_state_dict(found.record["scaler"])
    run.step = found.step
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
    if bool(theirs["scaler"]) != bool(ours["scaler"]):
        raise UserError(
            f"{found.folder}: was{'' if theirs['scaler'] else ' not'} trained with --fp16; go on so, or start afresh"
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
    if exported_step(goal) == run.step:
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
def profiler(config: TrainConfig, folder: Path):  # type: ignore[no-untyped-def]  # yields a function of the steps done
    """Between the two steps of --profiler_options, a trace that chrome://tracing and Perfetto open."""
    steps = config.profiled_steps()
    if steps is None:
        yield lambda done: None
        return
    profile = torch.profiler.profile()

    def after(done: int) -> None:
        if done == steps[0]:
            profile.start()
        if done == steps[1] + 1:
            profile.stop()
            profile.export_chrome_trace(str(folder / f"trace-{steps[0]}-{steps[1]}.json"))

    yield after
