"""`uvit bench`: times the training step, the forward pass and the loader, relative to a matrix product.

It times the code of `uvit train` on a feature store of random numbers. The matrix product (matmul) is timed again
between the measurements. On a shared machine the speed drifts by tens of per cent within a minute, so only the ratio to
the matmul just before and after says something about the code.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from uvit.bench.random_store import write_random_store
from uvit.config.bench import BenchConfig
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.device import keep_freed_memory, pick_device
from uvit.errors import UserError
from uvit.progress import Progress
from uvit.train.loader import BatchDataset
from uvit.train.profiling import count_flops, mfu_reference
from uvit.train.setup import Run, build_run
from uvit.train.step import train_step
from uvit.weights.unet import new_unet

LOADER_BATCH_SIZE = 32
LOADER_PAIRS = 1024  # 137 MB at COCO's shapes
BENCH_SIZES = {"cpu": (4, 2048), "cuda": (256, 8192)}  # batch, and rows of the matrices
NUM_WARM_UPS = 2  # the allocator needs two rounds to settle

Job = Callable[[], object]
Timing = tuple[float, float]  # seconds of a job, and of the matmul before and after it


def bench(config: BenchConfig) -> None:
    """Measure and print."""
    config = with_sizes(config, pick_device(config.device))
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with tempfile.TemporaryDirectory(prefix="uvit-bench-") as folder:
        run = build_bench_run(config, Path(folder))
        print(describe_run(config, run))
        matmul, forward, step = make_jobs(config, run)
        timings = time_rounds({"forward": forward, "training step": step}, matmul, config.steps, run.device)
        forward_flops, step_flops = count_flops(resolve_model_config(config.uvit_config_file), config.batch_size)
        flops = {"forward": forward_flops, "training step": step_flops}
        print(format_table(timings, flops, 2 * config.matmul_size**3, config.batch_size))
        print(describe_utilisation(run, timings["training step"]))
        if config.loader:
            rate = loader_rate(run)
            print(f"loader: {rate:,.0f} samples/s in one process, batches of {LOADER_BATCH_SIZE}")


def with_sizes(config: BenchConfig, device: torch.device) -> BenchConfig:
    """With sizes instead of zeros: large enough for the device, so that its speed is timed and not its launches."""
    batch_size, matmul_size = BENCH_SIZES[device.type]
    return replace(config, batch_size=config.batch_size or batch_size, matmul_size=config.matmul_size or matmul_size)


def build_bench_run(config: BenchConfig, folder: Path) -> Run:
    """A training run on random features."""
    with torch.device("meta"):
        unet = new_unet(resolve_model_config(config.uvit_config_file))
    pixels = config.latents == "none"
    if pixels and unet.config["in_channels"] != 3:
        raise UserError(
            f"--latents none: times a model on pixels, which have 3 channels; that of --uvit_config_file "
            f"{config.uvit_config_file} has {unet.config['in_channels']}"
        )
    num_pairs = LOADER_PAIRS if config.loader else config.batch_size
    return build_run(
        TrainConfig(
            feature_path=str(write_random_store(folder / "features", unet, num_pairs, pixels=pixels)),
            output_dir=str(folder / "run"),
            uvit_config_file=config.uvit_config_file,
            per_device_train_batch_size=config.batch_size,
            bf16=config.precision == "bf16",
            fp16=config.precision == "fp16",
            recompute=config.recompute,
            compile=config.compile,
            device=config.device,
        ),
        folder / "run",
    )


def make_jobs(config: BenchConfig, run: Run) -> tuple[Job, Job, Job]:
    """(a matmul in the dtype of the precision, a forward pass as in sampling, a training step)."""
    size = (config.matmul_size, config.matmul_size)
    left, right, product = (torch.randn(size, device=run.device).to(run.precision.dtype) for _ in range(3))
    batch = run.batches[0].to(run.device)
    assert batch.context is not None
    latents, context = batch.noise, run.precision.cast(batch.context)
    batches = itertools.repeat(batch)

    def forward() -> None:
        with torch.no_grad(), run.precision.autocast():
            run.precision.compute_model["unet"](latents, batch.timesteps, context)

    return lambda: torch.mm(left, right, out=product), forward, lambda: train_step(run, batches)


def time_rounds(jobs: dict[str, Job], matmul: Job, rounds: int, device: torch.device) -> dict[str, list[Timing]]:
    """{name: [(seconds, mean seconds of the matmul just before and after), ...]}."""
    timings: dict[str, list[Timing]] = {name: [] for name in jobs}
    with Progress("bench", NUM_WARM_UPS + rounds, "round") as progress:
        for round_ in progress.over(range(-NUM_WARM_UPS, rounds)):
            before = best_of(matmul, device)
            for name, job in jobs.items():
                elapsed = seconds(job, device)
                after = best_of(matmul, device)
                if round_ >= 0:
                    timings[name].append((elapsed, (before + after) / 2))
                before = after
    return timings


def best_of(job: Job, device: torch.device, times: int = 3) -> float:
    return min(seconds(job, device) for _ in range(times))


def seconds(job: Job, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    job()
    _synchronize(device)
    return time.perf_counter() - start


def loader_rate(run: Run) -> float:
    """Samples per second of the loader alone, from a store in memory: the median of ten epochs."""
    batches = BatchDataset(run.features, LOADER_BATCH_SIZE, run.config.seed)
    num_batches = LOADER_PAIRS // LOADER_BATCH_SIZE

    def epoch(number: int) -> None:
        for index in range(number * num_batches, (number + 1) * num_batches):
            batches[index]

    epoch(0)
    cpu = torch.device("cpu")
    return LOADER_PAIRS / statistics.median(seconds(lambda i=i: epoch(i), cpu) for i in range(1, 11))  # type: ignore[misc]


def describe_run(config: BenchConfig, run: Run) -> str:
    cuda, num_threads = run.device.type == "cuda", torch.get_num_threads()
    hardware = torch.cuda.get_device_name(run.device) if cuda else f"{num_threads} thread{'s'[: num_threads > 1]}"
    hardware += "" if cuda else f", allocator: {keep_freed_memory()}"
    options = [config.precision, *(name for name in ("compile", "recompute") if getattr(config, name))]
    num_parameters, size = sum(p.numel() for p in run.master_model.parameters()), config.matmul_size
    return (
        f"{config.uvit_config_file}: {num_parameters:,} parameters, batch {config.batch_size}, "
        f"{', '.join(options)}; {run.device} ({hardware}), torch {torch.__version__}; "
        f"medians of {config.steps} rounds; matmul: the product of two {size}x{size} matrices"
    )


def format_table(timings: dict[str, list[Timing]], flops: dict[str, int], matmul_flops: int, batch_size: int) -> str:
    """Median times and rates. The last column is the median of the ratios of each measurement to its own matmul."""
    matmul = statistics.median(beside for rows in timings.values() for _, beside in rows)
    lines = [f"{'':<14}{'ms':>10}{'samples/s':>11}{'GFLOP':>10}{'GFLOP/s':>10}{'of matmul':>11}"]
    gflop = matmul_flops / 1e9
    lines.append(f"{'matmul':<14}{matmul * 1e3:>10.1f}{'':>11}{gflop:>10.1f}{gflop / matmul:>10.1f}")
    for name, rows in timings.items():
        median = statistics.median(elapsed for elapsed, _ in rows)
        ratio = statistics.median(flops[name] / elapsed / (matmul_flops / beside) for elapsed, beside in rows)
        lines.append(
            f"{name:<14}{median * 1e3:>10.1f}{batch_size / median:>11.2f}{flops[name] / 1e9:>10.1f}"
            f"{flops[name] / median / 1e9:>10.1f}{ratio:>11.1%}"
        )
    return "\n".join(lines)


def describe_utilisation(run: Run, timings: list[Timing]) -> str:
    """The MFU of the median step, as `uvit train` reports it."""
    reference = mfu_reference(run)
    share = reference.utilisation(statistics.median(elapsed for elapsed, _ in timings))
    return reference.sentence if share is None else f"training step: {share:.1%} MFU; {reference.sentence}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
