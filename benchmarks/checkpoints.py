"""Saving checkpoints: how long it takes, how long training waits for it, and how both grow with the size.

    python benchmarks/checkpoints.py [--models uvit_t2i_small ...] [--saves 5] [--folder DIR] [--cores 1]

For each model, a new process saves the checkpoint of a training run (weights, EMA weights, optimizer; random numbers)
several times, as training does: a thread copies during the next step's forward and backward pass (batch 1), then
writes, hashes and syncs. Each save starts when the one before is complete and the disk is idle. The stall is what
training waits: in `Checkpointer.save`, and before the update of the next step. The first save makes the buffers to copy
to, the others use them again. The figures are medians of these others. In turns with them, as many bytes are written
and synced by plain code, which tells what the disk can do at that time.

The exponents are the slopes of log(time) against log(bytes): 1 is linear.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = ["uvit_t2i_small", "uvit_t2i_small_deep", "uvit_t2i_large"]
BLOCK = 2**22  # bytes that plain code writes at a time


def write_plainly(path: Path, num_bytes: int) -> float:
    """The seconds that it takes to write and sync random bytes."""
    block = os.urandom(BLOCK)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def measure(model: str, saves: int, place: str | None) -> dict[str, float]:
    """In this process."""
    import torch

    from uvit.bench.run import build_bench_run, make_jobs
    from uvit.config.bench import BenchConfig
    from uvit.train.checkpointing import Checkpointer, run_state

    random = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {key: [] for key in ("save", "stall", "plain")}
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=place) as name:
        folder = Path(name)
        config = BenchConfig(uvit_config_file=model, batch_size=1, device="cpu")
        run = build_bench_run(config, folder)
        _, _, step = make_jobs(config, run)
        with torch.no_grad():
            for tensors in run_state(run).values():
                for tensor in tensors.values():
                    tensor.uniform_(generator=random)
        num_bytes = 0
        with Checkpointer(run) as checkpointer:
            wait_for_copy, waits = run.before_update, list[float]()

            def timed_wait() -> None:
                started = time.perf_counter()
                wait_for_copy()
                waits.append(time.perf_counter() - started)

            run.before_update = timed_wait
            for _ in range(saves):
                step()
                os.sync()
                waits.clear()
                started = time.perf_counter()
                checkpointer.save()
                waits.append(time.perf_counter() - started)
                step()
                checkpointer.saver.wait()
                found["save"].append(time.perf_counter() - started)
                found["stall"].append(sum(waits))
                assert run.checkpoint
                num_bytes = sum(path.stat().st_size for path in run.checkpoint.iterdir())
                shutil.rmtree(run.checkpoint)
                os.sync()
                found["plain"].append(write_plainly(folder / "plain", num_bytes))
    later = {key: statistics.median(values[1:]) for key, values in found.items()}
    return {"bytes": num_bytes, "first_stall": found["stall"][0], "first_save": found["save"][0], **later}


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """The slope of the line through the logarithms, by least squares."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(each) for each in seconds])
    return slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--saves", type=int, default=5, help="of each model, 2 or more")
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="measure this process, and print JSON")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    if options.alone:
        print(json.dumps(measure(options.models[0], options.saves, options.folder)))
        return
    print("| model | GB | save, s | of plain writes | stall, s | of the save | first save, s | its stall, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    rows = []
    for model in options.models:
        words = [sys.executable, __file__, "--alone", "--models", model, "--saves", str(options.saves)]
        words += ["--cores", str(options.cores), *(["--folder", options.folder] if options.folder else [])]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.cores)}
        output = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        rows.append(row)
        print(
            f"| {model} | {row['bytes'] / 1e9:.2f} | {row['save']:.2f} | {row['save'] / row['plain']:.2f} "
            f"| {row['stall']:.3f} | {row['stall'] / row['save']:.1%} | {row['first_save']:.2f} "
            f"| {row['first_stall']:.3f} |",
            flush=True,
        )
    if len(rows) > 1:
        sizes = [row["bytes"] for row in rows]
        for key, what in (("save", "save"), ("plain", "plain writes"), ("stall", "stall")):
            print(f"The time of the {what} grows as bytes ** {exponent(sizes, [row[key] for row in rows]):.2f}.")


if __name__ == "__main__":
    main()
