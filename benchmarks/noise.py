"""What the random numbers of a sample cost the loader: its noise with --noise_device host, and device on a CPU.

    python benchmarks/noise.py --batch_size 32

CPU time of one thread, per sample: the lowest of the rounds, in which both sides take turns. `free` is how far another
thread gets meanwhile that needs the interpreter's lock, relative to how far it gets alone.
"""

import argparse
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from uvit.device import keep_freed_memory
from uvit.train.loader import random_draws
from uvit.train.noise import draw_noise

SEED = 1234


def counted_beside(job: Callable[[], object], seconds: float) -> float:
    """Additions a second of another thread while this one does a job again and again."""
    stop, count = threading.Event(), 0

    def add() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=add)
    started = time.perf_counter()
    thread.start()
    while time.perf_counter() < started + seconds:
        job()
    stop.set()
    thread.join()
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    size, shape = options.batch_size, (4, 32, 32)
    counters = np.arange(size)

    sides: dict[str, Callable[[], object]] = {
        "captions, timesteps": lambda: random_draws(counters, SEED, shape, noises=False),
        "the same, noise of the host": lambda: random_draws(counters, SEED, shape),
        "noise of the device": lambda: draw_noise(0, size, SEED, shape),
    }
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(options.rounds):
        for name, job in sides.items():
            started = time.thread_time()
            job()
            seconds[name] = min(seconds[name], time.thread_time() - started)
    alone = counted_beside(lambda: time.sleep(0.01), 1.0)
    for name, job in sides.items():
        free = counted_beside(job, 1.0) / alone
        print(f"{name:<28} {seconds[name] / size * 1e6:6.1f} us a sample, another thread {free:.0%} free")
    draws, host, device = seconds.values()
    print(f"noise alone: {(host - draws) / device:.1f} times as much time on the host's side")


if __name__ == "__main__":
    main()
