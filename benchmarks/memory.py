"""Compare the memory that `uvit train --dry_run` predicts with what short training runs take, for each process.

    python benchmarks/memory.py [--uvit_config_file uvit_t2i_small] [--degrees 1x1x1 2x1x1 1x2x1 1x1x2]
    python benchmarks/memory.py --published     # the published configs at 32 a process, from the dry run alone

Allocated is what torch's allocator has given out at most, from before anything is set up until after the third step:
torch's profiler records every allocation. Not in it: what oneDNN and gloo take for themselves. Grown is how much larger
the process became by the kernel's count (VmHWM), in a second training that nothing records: with all of that, and with
the libraries that set-up loads. Freed memory goes back to the system at once there (MALLOC_MMAP_THRESHOLD_); as the C
library is usually set, it keeps some, and a process grows by a further tenth or so. Features are random, at COCO's
shapes; processes communicate with gloo; float32 unless flags say otherwise. Both columns are of the process that has
the most."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvit.bench.random_store import write_random_store
from uvit.cli.parse import parse
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.distributed.mesh import Degrees, destroy_distributed, init_distributed
from uvit.train.dry_run import build_meta_run, make_plan, plan_of_run
from uvit.train.profiling import meta_unet
from uvit.train.setup import build_run
from uvit.train.step import train_step
from uvit.train.trainer import load_batches

MIB = 2**20
SMALL = ["--per_device_train_batch_size", "4"]
CASES = {  # by degrees: flags of each training
    "1x1x1": [
        SMALL,
        ["--per_device_train_batch_size", "8"],
        [*SMALL, "--use_ema", "False"],
        [*SMALL, "--recompute"],
        [*SMALL, "--gradient_accumulation_steps", "2"],
        [*SMALL, "--bf16"],
        [*SMALL, "--bf16", "--fp16_opt_level", "O2"],
    ],
    "2x1x1": [SMALL, [*SMALL, "--recompute"], [*SMALL, "--gradient_accumulation_steps", "2"]],
    "1x2x1": [SMALL, [*SMALL, "--recompute"], [*SMALL, "--gradient_accumulation_steps", "2"]],
    "1x1x2": [SMALL, [*SMALL, "--recompute"]],
}
PUBLISHED = ["small", "small_deep", "large", "huge", "850M", "gaint", "gaint2"]


def arguments(folder: Path, model: str, degrees: str, flags: list[str]) -> list[str]:
    dp, shard, tp = degrees.split("x")
    return [
        *("--feature_path", str(folder), "--output_dir", str(folder / "run"), "--uvit_config_file", model),
        *("--dp_degree", dp, "--sharding_parallel_degree", shard, "--tensor_parallel_degree", tp, "--device", "cpu"),
        *("--dataloader_num_workers", "0", "--eval_steps", "-1", *flags),
    ]


# In a process of its own


def high_water() -> int:
    """Bytes that this process has ever had in memory at once."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(kind: str, result: Path, flags: list[str]) -> None:
    config, _ = parse(TrainConfig, flags, prog="uvit train")
    world = init_distributed(
        Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree), "cpu"
    )
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    before = high_water()
    if kind == "allocated":
        profile.start()
    run = build_run(config, Path(config.output_dir), world)
    batches = load_batches(run)
    for _ in range(3):
        train_step(run, batches)
    peak = high_water() - before
    if kind == "allocated":
        profile.stop()
        profiler: Any = profile.profiler
        events = profiler.kineto_results.events()
        sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peak = int(np.cumsum([size for _, size in sizes]).max())
    (result / f"{world.rank}.json").write_text(json.dumps(peak), encoding="utf-8")
    destroy_distributed(world)


# In the main process


def predicted(flags: list[str]) -> tuple[int, float]:
    """-> (bytes a process, the network's parameters in millions), as the dry run predicts them."""
    config, _ = parse(TrainConfig, flags, prog="uvit train")
    run = build_meta_run(config)
    return sum(plan_of_run(run).memory.values()), run.master_model["unet"].num_parameters() / 1e6


def measured(kind: str, flags: list[str], size: int) -> int:
    """Bytes `allocated` or `grown`, of the process that has the most."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": str(2**16),
                "UVIT_ALLOCATOR": "system",
            }
            if size > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            command = [sys.executable, __file__, "--measure", kind, folder, *flags]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        if sum(process.wait() for process in processes):
            raise SystemExit("a training failed")
        return max(json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json"))


def compare(folder: Path, model: str, layouts: list[str]) -> None:
    print(f"{model}, MiB a process\n")
    print("| dp x shard x tp | flags | dry run | allocated | dry run / allocated | grown |")
    print("|---|---|---|---|---|---|")
    for degrees in layouts:
        for flags in CASES[degrees]:
            every = arguments(folder, model, degrees, flags)
            size = int(np.prod([int(degree) for degree in degrees.split("x")]))
            planned, _ = predicted(every)
            allocated, grown = (measured(kind, every, size) for kind in ("allocated", "grown"))
            words = " ".join(flags).replace("--per_device_train_batch_size", "batch")
            print(
                f"| {degrees} | {words} | {planned / MIB:,.0f} | {allocated / MIB:,.0f} | {planned / allocated:.1%} "
                f"| {grown / MIB:,.0f} |",
                flush=True,
            )


def published(folder: Path) -> None:
    columns = {
        "as it is": ("1x1x1", []),
        "--recompute": ("1x1x1", ["--recompute"]),
        "shard 8": ("1x8x1", []),
        "shard 8, --recompute": ("1x8x1", ["--recompute"]),
        "tp 2": ("1x1x2", []),
    }
    print("| config | parameters |", " | ".join(columns), "|")
    print("|---" * (2 + len(columns)) + "|")
    for name in PUBLISHED:
        cells, millions = [], 0.0
        for degrees, flags in columns.values():
            planned, millions = predicted(
                arguments(folder, f"uvit_t2i_{name}", degrees, ["--device", "auto", "--bf16", *flags])
            )  # not cpu: fused attention
            cells.append(f"{planned / 2**30:,.1f}")
        print(f"| `uvit_t2i_{name}` | {millions:,.0f} M |", " | ".join(cells), "|", flush=True)


def on_an_a100() -> None:
    """What U-ViT's authors report of H/2 with a class in place of words, beside what is planned for the same."""
    sizes = resolve_model_config("uvit_t2i_huge") | {"num_text_tokens": 1}
    print("\nH/2 on one A100, class-conditional, batch 128, fp16, GB")
    for recompute, reported in ((False, 54.3), (True, 18.9)):
        config = TrainConfig("features", "run", fp16=True, recompute=recompute, per_device_train_batch_size=128)
        planned = sum(make_plan(config, sizes, (32, 32)).memory.values()) / 1e9
        print(f"recompute {recompute}: planned {planned:.1f}, reported {reported}, {planned / reported:.1%}")


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvit_config_file", default="uvit_t2i_small")
    parser.add_argument("--degrees", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--published", action="store_true", help="GiB of the published configs, at 32 a process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_store(folder, meta_unet(resolve_model_config("uvit_t2i_small")), num_pairs=64)
        if options.published:
            published(folder)
            on_an_a100()
        else:
            compare(folder, options.uvit_config_file, options.degrees)


if __name__ == "__main__":
    main()
