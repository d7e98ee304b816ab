"""`uvit train`: set up or resume, step, log, save, and at the end a pipeline folder."""

import contextlib
import dataclasses
import errno
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from uvit import checkpoint
from uvit.config.train import TrainConfig
from uvit.config_file import write_yaml
from uvit.convert.export import export_checkpoint, exported_facts
from uvit.data.features import OldLayout
from uvit.data.loader import load
from uvit.data.types import Batch
from uvit.distributed.mesh import Degrees, World, start
from uvit.distributed.mesh import stop as leave
from uvit.distributed.ops import any_of, barrier
from uvit.errors import UserError
from uvit.train.boards import check_boards
from uvit.train.clock import peak_memory_bytes
from uvit.train.estimate import describe
from uvit.train.guards import stretches
from uvit.train.hang import alive, called, watched
from uvit.train.metrics import Metrics, Silent, logs_folder
from uvit.train.preview import load_preview_vae, preview
from uvit.train.repeatable import repeatable
from uvit.train.rollback import keep_passed_over, roll_back
from uvit.train.saving import Saving, resume
from uvit.train.setup import Run, set_up
from uvit.train.step import StepResult, train_step
from uvit.train.utilisation import Work, work_of
from uvit.train.validate import is_due, validate

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # that nothing but writing meets with
FOLDER_ERRORS = DISK_ERRORS | {errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM}


def train(config: TrainConfig) -> int:
    """Train to the last step, or until Ctrl-C or SIGTERM. Returns the exit status."""
    for sentence in config.ignored_flags():
        print(sentence)
    check_boards(config)
    if config.dry_run:
        print(describe(config))
        return 0
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    with repeatable(config.deterministic and on_gpu):
        world = start(degrees, config.device)
        try:
            # What the main process says is true of all.
            silence = contextlib.nullcontext() if world.is_main else contextlib.redirect_stdout(None)
            with silence, plain_errors(config, DISK_ERRORS):
                name = f"process_{world.rank}_of_{world.size}"
                return called(name, lambda: train_together(config, world))
        finally:
            leave(world)


def train_together(config: TrainConfig, world: World) -> int:
    """What every process of a run does."""
    output_dir = Path(config.output_dir)
    with watched(config.hang_timeout, world):
        run = set_up(config, output_dir, world)
        if config.overwrite_output_dir and world.is_main:
            set_aside(output_dir)
        barrier(world)
        resume(run)
        if world.is_main:
            with plain_errors(config, FOLDER_ERRORS):
                output_dir.mkdir(parents=True, exist_ok=True)
                write_yaml(dataclasses.replace(config, overwrite_output_dir=False), output_dir / "config.yaml")
            keep_passed_over(run)
        if run.step >= run.max_steps:
            print(f"{output_dir}: all {run.max_steps} steps are done")
            status = 0
        else:
            with stop_signals() as signals:
                status = train_to_the_end(run, signals)
    if status == 0 and world.is_main:
        write_pipeline(run)
    barrier(world)  # who leaves early is not there to start again with, should the main process fail in this
    return status


def train_to_the_end(run: Run, stop: "Stop") -> int:
    vae = load_preview_vae(run)
    work = work_of(run) if run.world.is_main else None
    if work:
        print(work.sentence)
    while not train_on(run, stop, vae, work):
        roll_back(run)
    if run.step < run.max_steps:
        print(f"stopped at step {run.step} of {run.max_steps}, saved; run the same command again to go on")
        return 128 + (stop.signal or signal.SIGTERM)  # the signal may have reached another process alone
    return 0


def train_on(run: Run, stop: "Stop", vae: AutoencoderKL | None, work: Work | None) -> bool:
    """To the last step or a signal, and save; False: before that, too many updates in a row were skipped."""
    config, first_step = run.config, run.step
    metrics: Metrics | Silent = Silent()
    if work:
        old_layout = isinstance(run.features, OldLayout)
        metrics = Metrics(config, run.output_dir, run.step, run.max_steps, run.samples_per_step, work, old_layout)
    batches = load_batches(run)
    try:
        with profiler(config, run) as profile, Saving(run) as saving:
            while run.step < run.max_steps and not any_of(bool(stop.signal), run.world):
                alive(config.hang_timeout, run.world)
                started = time.perf_counter()
                result = train_step(run, batches)
                seconds = time.perf_counter() - started

                record = record_of(run, result, seconds)
                metrics.step(record | (validate(run) if is_due(run) else {}))
                if run.guards.skipped_in_a_row >= config.max_nonfinite_steps:
                    return False
                if vae and run.step % config.image_logging_steps == 0:
                    metrics.image("preview", preview(run, vae), run.step)
                if run.step % config.save_steps == 0:
                    metrics.flush()
                    with run.clock.wait("save"):
                        saving.save()
                if folder := saving.saved():
                    metrics.say(f"saved {folder}")
                profile(run.step - first_step)
            metrics.flush()
            seconds = saving.save_and_wait()
            metrics.say(f"saved {run.checkpoint} ({seconds:.1f} s)")
        if config.benchmark:
            metrics.say(f"steady state: {metrics.throughput()}")
    finally:
        metrics.close()
    return True


def load_batches(run: Run) -> Iterator[Batch]:
    """Those that this process has to compute, from the run's sample counter on."""
    config, world, num_steps = run.config, run.world, run.max_steps - run.step
    for first, count in stretches(run.samples, run.samples_per_step, num_steps, run.guards.passed_over):
        run.batches.first_sample = first
        num_batches = count * config.gradient_accumulation_steps
        share = range(world.data_rank, num_batches * world.num_data_ranks, world.num_data_ranks)
        yield from load(run.batches, share, config.dataloader_num_workers, run.device)


def record_of(run: Run, result: StepResult, seconds: float) -> dict[str, float | int | None]:
    """A line of metrics.jsonl. Of the seconds, those for saving come on top, in the line after."""
    return {
        "step": run.step,
        "samples": run.samples,
        "loss": result.loss if result.finite else None,
        "grad_norm": result.grad_norm if result.finite else None,
        "lr": result.lr,
        "skipped": int(result.skipped),
        "seconds": round(seconds, 6),
        **run.clock.read(),
        "peak_memory_bytes": peak_memory_bytes(run.device),
    }


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
    except SafetensorError as error:
        raise cannot_write(run.config, error) from None


# A disk that takes no more, Ctrl-C, SIGTERM, the profiler


@contextlib.contextmanager
def plain_errors(config: TrainConfig, numbers: set[int]) -> Iterator[None]:
    """Some errors of the system, in a sentence."""
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
    return UserError(f"{where}: cannot be written to ({error}); mend that, and run the same command again to go on")


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
