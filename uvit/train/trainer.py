"""`uvit train`: start or resume a run, train, log and save, and export the pipeline at the end."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from uvit.checkpoint.folder import read_checkpoint, training_facts
from uvit.config.train import TrainConfig
from uvit.device import use_tf32
from uvit.distributed.mesh import START_TIMEOUT, Degrees, World, init_distributed, set_step_timeout, set_timeout
from uvit.distributed.mesh import destroy_distributed as shutdown
from uvit.distributed.ops import LateFlag, any_of, barrier, on_main
from uvit.errors import UserError
from uvit.export.convert import USUAL_ENCODERS, convert_command, export_checkpoint, missing_encoders
from uvit.store.npy_layout import NpyFeatures
from uvit.train.best import Tracked, new_best, settle_best, tracked_score
from uvit.train.checkpointing import Checkpointer, resume
from uvit.train.checks import check_latents
from uvit.train.clock import peak_memory_bytes
from uvit.train.cuda_graph import GraphedPass
from uvit.train.device_defaults import describe_speed, with_device_defaults
from uvit.train.dry_run import describe_plan, does_not_fit
from uvit.train.evaluation import Evaluation, open_evaluation
from uvit.train.guards import step_ranges
from uvit.train.loader import Batch, prefetch
from uvit.train.metrics import Metrics, NullMetrics, check_trackers, logs_folder
from uvit.train.placement import place_features
from uvit.train.preview import load_preview_decoder, preview_sheet
from uvit.train.process import (
    StopSignal,
    deterministic_mode,
    hang_watchdog,
    report_stop,
    reset_hang_timer,
    run_in_named_frame,
    stop_signals,
)
from uvit.train.profiling import MfuReference, mfu_reference
from uvit.train.rollback import roll_back
from uvit.train.run_folder import (
    DISK_ERRORS,
    cannot_write,
    disk_errors,
    lock_run,
    mark_for_overwriting,
    prepare_folder,
)
from uvit.train.sampling import Decoder
from uvit.train.schedule import describe_samples_done, run_warnings
from uvit.train.setup import Run, build_run
from uvit.train.step import StepResult, train_step
from uvit.train.validate import validate, validation_is_due


def train(config: TrainConfig) -> int:
    """`uvit train`: start this process's part of the run. Returns the exit status."""
    for sentence in config.ignored_flags():
        print(sentence)
    check_trackers(config)
    if config.dry_run:
        print(describe_plan(config))
        return 0
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    with deterministic_mode(config.deterministic and on_gpu):
        world = init_distributed(degrees, config.device)
        use_tf32(config.tf32)
        config = with_device_defaults(config, world.device)
        try:
            # Only the main process prints: what it says holds for all processes.
            silence = contextlib.nullcontext() if world.is_main else contextlib.redirect_stdout(None)
            with silence, disk_errors(config, DISK_ERRORS):
                name = f"process_{world.rank}_of_{world.size}"
                return run_in_named_frame(name, lambda: run_training(config, world))
        except torch.OutOfMemoryError:
            num_bytes = torch.cuda.get_device_properties(world.device).total_memory
            raise does_not_fit(config, f"{num_bytes / 2**30:.0f} GiB of {world.device}", num_bytes) from None
        finally:
            shutdown(world)


def run_training(config: TrainConfig, world: World) -> int:
    """Start or resume the run, train, and export the pipeline. Returns the exit status."""
    status = 0
    with contextlib.ExitStack() as held:
        with hang_watchdog(config.hang_timeout, world):
            on_main(lambda: mark_for_overwriting(config), world)
            run = build_run(config, Path(config.output_dir), world)
            on_main(lambda: check_latents(run.features, run.conventions, config.feature_path), world)
            on_main(lambda: lock_run(run, held), world)
            resume(run)
            on_main(lambda: prepare_folder(run), world)
            if run.step >= run.max_steps:
                print(f"{run.output_dir}: all {run.step} steps are done ({describe_samples_done(run)})")
            else:
                if run.device.type == "cuda":
                    print(describe_speed(config))
                for sentence in run_warnings(run):
                    print(f"warning: {sentence}")
                with stop_signals() as stop:
                    reports = open_reports(run)
                    if config.cuda_graphs:
                        run.replay = GraphedPass(run)
                    if said := place_features(run):
                        print(said)
                    while not training_loop(run, stop, reports):
                        roll_back(run)
                if run.step < run.max_steps:
                    status = report_stop(stop, run.step, run.max_steps, config.overwrite_output_dir)
        set_timeout(world, START_TIMEOUT)  # the others wait while the main process exports
        if status == 0 and world.is_main:
            export_pipeline(run)
        barrier(world)  # all must be there to restart, should the main process fail to export
    return status


@dataclass(frozen=True)
class Reports:
    """What a run measures and shows beside its steps. None: is not wanted, or not of this process."""

    preview_decoder: Decoder | None
    evaluation: Evaluation | None
    tracked: Tracked | None  # the score of --keep_best
    mfu: MfuReference | None  # of the main process


def open_reports(run: Run) -> Reports:
    decoder = load_preview_decoder(run)
    evaluation = open_evaluation(run, decoder)
    mfu = mfu_reference(run) if run.world.is_main else None
    if mfu:
        print(mfu.sentence)
    return Reports(decoder, evaluation, tracked_score(run, evaluation), mfu)


def training_loop(run: Run, stop: StopSignal, reports: Reports) -> bool:
    """Train to the last step, or until a signal, and save. Returns False if too many steps in a row were skipped."""
    config, first_step = run.config, run.step
    metrics: Metrics | NullMetrics = NullMetrics()
    if reports.mfu:
        npy = isinstance(run.features, NpyFeatures)
        metrics = Metrics(config, run.output_dir, run.step, run.max_steps, run.samples_per_step, reports.mfu, npy)
    settle_best(run, reports.tracked)
    batches = load_batches(run)
    try:
        with profiler(config, run) as profile, Checkpointer(run) as checkpointer:
            stopping, late_stop = any_of(bool(stop.signal), run.world), LateFlag(run.world)
            unread, seconds = list[StepResult](), 0.0
            while run.step < run.max_steps and not stopping:
                reset_hang_timer(config.hang_timeout, run.world)
                if run.lock:
                    run.lock.check()
                started = time.perf_counter()
                unread.append(train_step(run, batches))
                seconds += time.perf_counter() - started
                if run.step == first_step + 1:
                    set_step_timeout(run.world, config.hang_timeout)
                profile(run.step - first_step)
                stopping = late_stop(bool(stop.signal))
                if stopping or is_reading(run):
                    if not report_steps(run, reports, metrics, checkpointer, read_steps(run, unread, seconds)):
                        return False
                    unread, seconds = [], 0.0
            metrics.flush()
            save_seconds = checkpointer.save_and_wait()
            metrics.write(f"saved {run.checkpoint} ({save_seconds:.1f} s)")
        if config.benchmark:
            metrics.write(f"steady state: {metrics.throughput()}")
    finally:
        metrics.close()
    return True


# The steps


def load_batches(run: Run) -> Iterator[Batch]:
    """The batches of this process, from the run's sample counter on."""
    config, world, num_steps = run.config, run.world, run.max_steps - run.step
    for first_sample, count in step_ranges(run.samples, run.samples_per_step, num_steps, run.guards.skipped_samples):
        run.batches.first_sample = first_sample
        num_batches = count * config.gradient_accumulation_steps
        items = range(world.data_rank, num_batches * world.num_data_ranks, world.num_data_ranks)
        yield from prefetch(run.batches, items, config.dataloader_num_workers, run.device)


def snapshot_is_due(run: Run) -> bool:
    """After every --ema_snapshot_steps steps, and after the last update of the averages."""
    every = run.config.ema_snapshot_steps or run.config.save_steps
    last_update = run.max_steps - run.max_steps % run.config.ema_update_steps
    return run.step % every == 0 or run.step == last_update


def is_reading(run: Run) -> bool:
    """Whether the host waits for the steps so far. On a GPU it does so only where their numbers are needed."""
    config = run.config
    due = any(run.step % steps == 0 for steps in (config.logging_steps, config.save_steps))
    return (
        run.device.type == "cpu" or due or run.step == run.max_steps or validation_is_due(run) or snapshot_is_due(run)
    )


def read_steps(run: Run, results: list[StepResult], seconds: float) -> list[dict[str, Any]]:
    """Wait for these steps, tell the guards of them, and return their lines of metrics.jsonl.

    They took `seconds` so far; each line has the mean. The lines end at the step that calls for a rollback, if one
    does, and so does the run: a rollback undoes whatever came after it.
    """
    started = time.perf_counter()
    results[-1].wait()  # for all before it too
    mean = (seconds + time.perf_counter() - started) / len(results)
    phases = {name: round(value / len(results), 6) for name, value in run.clock.read().items()}
    times = {"seconds": round(mean, 6), **phases, "peak_memory_bytes": peak_memory_bytes(run.device)}
    records = []
    for result in results:
        run.guards.record_step(result.step, result.first_sample, result.skipped)
        records.append(step_metrics(run, result, times))
        if run.guards.skipped_in_a_row >= run.config.max_nonfinite_steps:
            run.step, run.samples = result.step, result.first_sample + run.samples_per_step
            break
    return records


def report_steps(
    run: Run,
    reports: Reports,
    metrics: Metrics | NullMetrics,
    checkpointer: Checkpointer,
    records: list[dict[str, Any]],
) -> bool:
    """Log the steps, and do what is due after the last one: validation, a preview, a snapshot, a checkpoint.

    Returns False if too many steps in a row were skipped: a rollback undoes what would follow.
    """
    config, (*earlier, record) = run.config, records
    for each in earlier:
        metrics.step(each)
    if validation_is_due(run):
        record |= validate(run) if run.validation is not None else {}
        record |= reports.evaluation.measure() if reports.evaluation else {}
    best = new_best(run, reports.tracked, record)
    metrics.step(record)
    if run.guards.skipped_in_a_row >= config.max_nonfinite_steps:
        return False
    if reports.preview_decoder and run.step % config.image_logging_steps == 0:
        metrics.image("preview", preview_sheet(run, reports.preview_decoder), run.step)
    if run.ema and run.ema.lengths and snapshot_is_due(run):
        run.ema.write_snapshots(run.output_dir, run.step, run.world)
    if best or run.step % config.save_steps == 0:
        metrics.flush()
        with run.clock.wait("save"):
            checkpointer.save_best(best) if best else checkpointer.save()
    if folder := checkpointer.saved():
        metrics.write(f"saved {folder}")
    return True


def step_metrics(run: Run, result: StepResult, times: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl. `save_seconds` are of the save before this step, and not part of `seconds`."""
    return {
        "step": result.step,
        "samples": result.first_sample + run.samples_per_step,
        "loss": result.loss if result.finite else None,
        **({} if result.align_loss is None else {"align_loss": result.align_loss if result.finite else None}),
        "grad_norm": result.grad_norm if result.finite else None,
        "lr": result.lr,
        **({} if result.muon_lr is None else {"muon_lr": result.muon_lr}),
        "skipped": int(result.skipped),
        **times,
    }


# The end


def export_pipeline(run: Run) -> None:
    """OUTPUT_DIR/pipeline from the last checkpoint. If an encoder is missing, print the command that does it."""
    checkpoint = run.checkpoint
    assert checkpoint is not None, "all steps are done, so it has saved or resumed one"
    folder = run.output_dir / "pipeline"
    facts, record = training_facts(folder), read_checkpoint(checkpoint).record
    if all(facts.get(key) == record[key] for key in ("step", "samples", "config")):
        print(f"{folder} already exists")
        return
    if missing := missing_encoders(checkpoint):
        features = "The `.npy` features" if isinstance(run.features, NpyFeatures) else "The features"
        usual = ["Stable Diffusion's VAE"] * ("vqvae" in missing)
        usual += [USUAL_ENCODERS["text_encoder"]] * (missing != ["vqvae"])
        print(
            f"trained. {features} do not say which encoders made them, so no pipeline was written. Features of U-ViT's "
            f"own extraction are made with {' and '.join(usual)}. With these encoders, this command writes the "
            f"pipeline:\n{convert_command(checkpoint, folder, missing)}"
        )
        return
    try:
        export_checkpoint(checkpoint, folder, replace=True)
        print(f'wrote {folder}; try: uvit sample --pipeline {shlex.quote(str(folder))} "..."')
    except UserError as error:
        print(f"trained, but no pipeline was written: {error}. Then run:\n{convert_command(checkpoint, folder)}")
    except SafetensorError as error:
        raise cannot_write(run.config, error) from None


# The profiler


@contextlib.contextmanager
def profiler(config: TrainConfig, run: Run):  # type: ignore[no-untyped-def]  # yields a function of the number of steps done
    """Record the steps of --profiler_options in a trace that chrome://tracing and Perfetto can open."""
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
