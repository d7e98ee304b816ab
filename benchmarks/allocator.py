"""Training steps with glibc's usual memory and with freed memory kept (uvit/device.py), in turns.

    python benchmarks/allocator.py [--batch_sizes 4 8] [--precision bf16] [--rounds 3]

Each round is a new process with one thread: five steps of uvit_t2i_small on random features, of which the last three
count. Page faults and CPU time are the kernel's, a step; peak is the most memory that the process had.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = {"usual": "system", "kept": ""}
NUM_STEPS, NUM_WARM_UPS = 5, 2


def measure(batch_size: int, precision: str) -> dict[str, float]:
    """Train for a few steps in this process."""
    import torch

    from uvit.bench.run import build_bench_run, make_jobs
    from uvit.config.bench import BenchConfig

    torch.set_num_threads(1)
    config = BenchConfig(batch_size=batch_size, precision=precision, device="cpu")  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        _, _, step = make_jobs(config, build_bench_run(config, Path(folder)))
        faults, seconds = [], []
        for _ in range(NUM_STEPS):
            before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            step()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            seconds.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "faults": statistics.mean(faults[NUM_WARM_UPS:]),
        "seconds": statistics.median(seconds[NUM_WARM_UPS:]),
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="measure this process, and print JSON")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.batch_sizes[0], options.precision)))
        return
    print("| batch | memory | page faults a step | CPU seconds a step | peak, MiB |\n|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, allocator in KINDS.items():
                words = [sys.executable, __file__, "--alone", "--batch_sizes", str(batch_size)]
                words += ["--precision", options.precision]
                environment = os.environ | {"UVIT_ALLOCATOR": allocator, "OMP_NUM_THREADS": "1"}
                output = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
                found[kind].append(json.loads(output.splitlines()[-1]))
        for kind, rounds in found.items():
            faults, seconds, peak = ([each[key] for each in rounds] for key in ("faults", "seconds", "peak"))
            print(
                f"| {batch_size} | {kind} | {min(faults):,.0f} to {max(faults):,.0f} | "
                f"{min(seconds):.2f} to {max(seconds):.2f} | {max(peak):,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
