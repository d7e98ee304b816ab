"""How the time of a step grows with batch, tokens, depth and width; of loading with pairs; of saving with parameters.

    python benchmarks/growth.py [--rounds 5]

A small U-ViT (width 128, 4 blocks and the middle one, latents of 16 x 16, batch 4) takes training steps on one thread,
in float32, on random features. One quantity at a time is doubled twice. The exponent is the slope of log(CPU time)
against log(quantity): 1 is linear. Tokens are those of the whole sequence: time, text and patches. Per parameter says
the same of depth and width against the number of parameters.

A store of COCO's shapes is loaded in batches of 32, for one epoch, warm. A checkpoint is saved in a temporary folder,
with its sync. Each figure is the median of the rounds, which are interleaved over the values of a quantity.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from uvit.bench.random_store import write_random_store
from uvit.config.train import TrainConfig
from uvit.device import keep_freed_memory
from uvit.io import write_json
from uvit.model import UViTT2IModel
from uvit.train.checkpointing import Checkpointer
from uvit.train.setup import Run, build_run
from uvit.train.step import train_step
from uvit.train.trainer import load_batches

NUM_TEXT_TOKENS = 77
BASE = {
    "sample_size": 16,
    "in_channels": 4,
    "patch_size": 2,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "mlp_ratio": 4,
    "clip_dim": 768,
    "num_text_tokens": NUM_TEXT_TOKENS,
}
PAIRS = (256, 1024, 4096)


def build(folder: Path, batch_size: int = 4, num_pairs: int = 64, **changes: int) -> Run:
    settings = BASE | changes
    write_json(folder / "model.json", settings)
    unet = UViTT2IModel(**settings)  # type: ignore[arg-type]
    config = TrainConfig(
        feature_path=str(write_random_store(folder / "features", unet, num_pairs)),
        output_dir=str(folder / "run"),
        uvit_config_file=str(folder / "model.json"),
        per_device_train_batch_size=batch_size,
        dataloader_num_workers=0,
        device="cpu",
    )
    return build_run(config, folder / "run")


def num_parameters(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.master_model.parameters())


def rounds_of(jobs: Mapping[float, Callable[[], float]], rounds: int) -> dict[float, float]:
    """{value: median seconds}. The first round does not count."""
    seconds: dict[float, list[float]] = {value: [] for value in jobs}
    for _ in range(rounds + 1):
        for value, job in jobs.items():
            seconds[value].append(job())
    return {value: statistics.median(each[1:]) for value, each in seconds.items()}


def exponent(times: Mapping[float, float]) -> float:
    logarithms = [[math.log(number) for number in numbers] for numbers in (times.keys(), times.values())]
    return statistics.linear_regression(*logarithms).slope


def report(what: str, quantity: str, times: Mapping[float, float]) -> None:
    values = ", ".join(f"{value:,.0f}" for value in times)
    milliseconds = ", ".join(f"{1000 * each:,.0f}" for each in times.values())
    print(f"| {what} | {quantity} | {values} | {milliseconds} | {exponent(times):.2f} |", flush=True)


def cpu_time_of(job: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        started = time.process_time()
        job()
        return time.process_time() - started

    return timed


def step_of(run: Run) -> Callable[[], float]:
    batches = load_batches(run)
    return cpu_time_of(lambda: train_step(run, batches))


def time_steps(folder: Path, rounds: int) -> None:
    def runs(name: str, changes: list[dict[str, int]]) -> list[Run]:
        made = []
        for i, change in enumerate(changes):
            (folder / f"{name}-{i}").mkdir()
            made.append(build(folder / f"{name}-{i}", **change))
        return made

    batches = [2, 4, 8, 16]
    made = runs("batch", [{"batch_size": size} for size in batches])
    report("step", "batch", rounds_of({b: step_of(run) for b, run in zip(batches, made, strict=True)}, rounds))
    sides = [16, 32, 48]
    made = runs("tokens", [{"sample_size": side} for side in sides])
    tokens = [1 + NUM_TEXT_TOKENS + (side // 2) ** 2 for side in sides]
    report("step", "tokens", rounds_of({n: step_of(run) for n, run in zip(tokens, made, strict=True)}, rounds))
    for name, changes in (
        ("depth", [{"num_layers": depth} for depth in (4, 8, 16)]),
        ("width", [{"num_attention_heads": heads} for heads in (2, 4, 8)]),
    ):
        made = runs(name, changes)
        times = rounds_of({i: step_of(run) for i, run in enumerate(made)}, rounds)
        values = [change.get("num_layers") or 64 * change["num_attention_heads"] for change in changes]
        report("step", name, dict(zip(values, times.values(), strict=True)))
        report("step", f"parameters, by {name}", dict(zip(map(num_parameters, made), times.values(), strict=True)))


def time_loading(folder: Path, rounds: int) -> None:
    jobs = {}
    for num_pairs in PAIRS:
        (folder / f"pairs-{num_pairs}").mkdir()
        run = build(folder / f"pairs-{num_pairs}", batch_size=32, num_pairs=num_pairs)
        jobs[num_pairs] = cpu_time_of(lambda run=run, n=num_pairs: [run.batches[i] for i in range(n // 32)])
    report("one epoch of loading", "pairs", rounds_of(jobs, rounds))


def time_saving(folder: Path, rounds: int) -> None:
    jobs = {}
    for width in (256, 512, 1024):
        (folder / f"save-{width}").mkdir()
        run = build(folder / f"save-{width}", num_attention_heads=width // 64, num_layers=12)
        checkpointer = Checkpointer(run)

        def save(run: Run = run, checkpointer: Checkpointer = checkpointer) -> float:
            run.step += 1  # a new folder each time
            return checkpointer.save_and_wait()

        jobs[num_parameters(run)] = save
    report("saving, wall time", "parameters", rounds_of(jobs, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| what | against | values | ms | exponent |\n|---|---|---|---|---:|")
    for job in (time_steps, time_loading, time_saving):
        with tempfile.TemporaryDirectory(prefix="growth-") as folder:
            job(Path(folder), options.rounds)


if __name__ == "__main__":
    main()
