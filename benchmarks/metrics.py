"""Time and memory of the metrics' statistics and distances, and the same by plain NumPy. Each runs in its own process.

    python benchmarks/metrics.py [--images 30000] [--features 2048]

Ours reads float32 features, whose own memory is not counted. NumPy collects them in float64, then takes `np.cov`, and
the roots of the eigenvalues of the covariances' product, as is common for FID.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from uvit.evaluate.frechet import FeatureStatistics, frechet_distance, statistics_of
from uvit.evaluate.kernel_distances import kid, kid_interval, kid_of_subsets
from uvit.evaluate.neighbours import precision_recall_density_coverage

BATCH = 64
SUBSET = 5000  # of whole-set KID and of neighbours, whose work grows with its square


def batches(images: int, width: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, width, generator=torch.Generator().manual_seed(0)) / 8
    for start in range(0, images, BATCH):
        n = min(BATCH, images - start)
        noise = torch.randn(n, width, generator=generator)
        yield (torch.randn(n, 64, generator=generator) @ mix + 0.3 * noise + 0.2).relu()


def clock(what: str, start: float) -> None:
    print(f"  {what:<44} {time.perf_counter() - start:7.1f} s", flush=True)


def ours(images: int, width: int) -> None:
    features = [torch.cat(list(batches(images, width, seed))) for seed in (1, 2)]
    found: list[FeatureStatistics] = []
    seconds = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in features:
        start = time.perf_counter()
        found.append(statistics_of(rows))
        seconds += time.perf_counter() - start
    print(f"  {'mean and covariance of one set':<44} {seconds / 2:7.1f} s", flush=True)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    start = time.perf_counter()
    value = frechet_distance(*found)
    clock(f"Frechet distance: {value:.6f}", start)
    print(f"  {'peak memory of the statistics':<44} {more / 2**10:7.0f} MiB", flush=True)


def by_numpy(images: int, width: int) -> None:
    found = []
    seconds = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in (1, 2):
        rows = np.empty((images, width))
        for i, batch in enumerate(batches(images, width, seed)):
            rows[i * BATCH : (i + 1) * BATCH] = batch.numpy()
        start = time.perf_counter()
        found.append((rows.mean(0), np.cov(rows, rowvar=False)))
        seconds += time.perf_counter() - start
        del rows
    print(f"  {'mean and covariance of one set':<44} {seconds / 2:7.1f} s", flush=True)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    start = time.perf_counter()
    (mu1, s1), (mu2, s2) = found
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    value = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots
    clock(f"Frechet distance: {value:.6f}", start)
    print(f"  {'peak memory of the statistics':<44} {more / 2**10:7.0f} MiB", flush=True)


def pairs(images: int, width: int) -> None:
    n = min(images, SUBSET)
    x, y = (torch.cat(list(batches(n, width, seed))) for seed in (1, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    mean, deviation = kid_of_subsets(x, y, subset_size=min(n, 1000))
    clock(f"KID, 100 subsets: {mean:.6f} +- {deviation:.6f}", start)
    start = time.perf_counter()
    clock(f"KID of {n} and {n}: {kid(x, y):.6f}", start)
    start = time.perf_counter()
    _, low, high = kid_interval(x, y)
    clock(f"the same with its interval: {low:.6f} to {high:.6f}", start)
    start = time.perf_counter()
    found = precision_recall_density_coverage(x, y)
    clock(f"precision {found.precision:.4f}, recall, density, coverage", start)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"  {'peak memory, besides the features':<44} {more / 2**10:7.0f} MiB", flush=True)


SIDES = {"ours": ours, "numpy": by_numpy, "pairs": pairs}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        SIDES[arguments.side](arguments.images, arguments.features)
    else:
        print(f"two sets of {arguments.images} x {arguments.features} features, {torch.get_num_threads()} threads")
        for side in SIDES:
            print(side, flush=True)
            size = ["--images", str(arguments.images), "--features", str(arguments.features)]
            subprocess.run([sys.executable, __file__, *size, "--side", side], check=True)
