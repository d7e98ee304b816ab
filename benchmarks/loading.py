"""Reading features for training from the feature store, from `.npy` features, and from four formats of other packages.

    python benchmarks/loading.py [--num_pairs 1024] [--folder DIR] [--repetitions 3]

All hold the same arrays, at COCO's shapes: moments 8x32x32 and five text embeddings of 77x768 for each image. All
deliver the same samples: every image once per epoch, in random order, with one of its text embeddings, in batches of
32. The `.npy` features (U-ViT layout) are float32, as usual; the others are float16. Ratios are to `.npy` features as
they are commonly read: `np.load` for each array of each item, and DataLoader's own collate.

Repetitions are interleaved: in each, every reader runs once for each number of workers, so that other load on the
machine affects all alike; the table has medians, and medians of each repetition's own ratios. Times are of a whole
pass, from the start to the last batch. Workers are the processes of a DataLoader; uvit's own are threads. Warm: as many
epochs as take about a second, after the files were read from end to end, so that all are in memory. Cold: one epoch,
after the page cache was dropped (as root, directory entries too; the first table says how much stayed cached). What a
cold pass leaves in memory is in smaller pieces than what `cat` leaves: copying it takes up to twice as long.

Formats whose packages (`webdataset`, `datasets`, `litdata`, `mosaicml-streaming`) are not installed are left out. The
benchmark needs 4.5 MB per image on disk, which it frees at the end: 4.6 GB for 1,024.
"""

import argparse
import contextlib
import ctypes
import gc
import mmap
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loading_formats import BASELINE, CONTEXT, MOMENTS, Format, installed_formats, number_of

NUM_WORKERS = (0, 1, 2)


# Measuring


@dataclass(frozen=True)
class Pass:
    samples_per_second: float
    cpu_ms: float  # a sample, of this process and its workers


def measure(format: Format, folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Pass:
    started, cpu = time.perf_counter(), cpu_seconds()
    num_samples = 0
    for moments, _ in format.load(folder / format.folder, num_pairs, num_epochs, num_workers, seed):
        num_samples += len(moments)
    elapsed = time.perf_counter() - started
    assert num_samples == num_pairs * num_epochs, (format.name, num_samples)
    return Pass(num_samples / elapsed, 1000 * (cpu_seconds() - cpu) / num_samples)


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def check(format: Format, folder: Path, num_pairs: int) -> None:
    """Each image comes once, with one of its own text embeddings."""
    seen = []
    for moments, contexts in format.load(folder / format.folder, num_pairs, 1, 0, 7):
        assert tuple(moments.shape[1:]) == MOMENTS and tuple(contexts.shape[1:]) == CONTEXT, format.name
        assert (number_of(moments) == number_of(contexts)).all(), format.name
        seen += number_of(moments).tolist()
    assert sorted(seen) == list(range(num_pairs)), format.name
    assert seen != sorted(seen), format.name


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def forget(folder: Path) -> float:
    """Make the system drop a folder's files from memory -> how much of them is still there, from 0 to 1."""
    gc.collect()  # what is mapped stays in memory
    os.sync()
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    resident = total = 0
    libc = ctypes.CDLL(None)
    for path in files_of(folder)[::7]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as map:
            num_pages = -(-len(map) // mmap.PAGESIZE)
            pages = (ctypes.c_ubyte * num_pages)()
            start = (ctypes.c_char * len(map)).from_buffer(map)
            assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(map)), pages) == 0
            resident, total = resident + sum(page & 1 for page in pages), total + num_pages
            del start
    return resident / total


def warm_up(folder: Path) -> None:
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def count_opened(format: Format, folder: Path, num_pairs: int) -> int:
    """How many times an epoch opens files; those that are mapped without Python's knowing count once."""
    place = str(folder / format.folder)
    opened: list[str] = []
    counting = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:  # an audit hook cannot be removed
        if counting and event == "open" and str(arguments[0]).startswith(place):
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    mapped: set[str] = set()
    for _ in format.load(folder / format.folder, num_pairs, 1, 0, 3):
        if not mapped:
            mapped = {f"/{line.partition('/')[2]}" for line in Path("/proc/self/maps").read_text().splitlines()}
    counting = False
    return len(opened) + sum(path.startswith(place) and path not in opened for path in mapped)


# The table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_pairs", type=int, default=1024)
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory(prefix="loading-", dir=options.folder) as folder:
        run(Path(folder), options.num_pairs, options.repetitions)


def run(folder: Path, num_pairs: int, repetitions: int) -> None:
    opened, formats = {}, installed_formats()
    for format in formats:
        if not (folder / format.folder).exists():
            format.write(folder / format.folder, num_pairs)
        check(format, folder, num_pairs)
        opened[format.name] = count_opened(format, folder, num_pairs)
    passes: dict[tuple[str, str, int], list[Pass]] = {}
    left = {format.name: 0.0 for format in formats}
    for repetition in range(repetitions):
        for num_workers in NUM_WORKERS:
            for format in formats:
                forget(folder / format.folder)
                warm_up(folder / format.folder)
                warm = measure(format, folder, num_pairs, format.warm_epochs, num_workers, repetition)
                left[format.name] = max(left[format.name], forget(folder / format.folder))
                cold = measure(format, folder, num_pairs, 1, num_workers, repetition)
                for state, done in (("cold", cold), ("warm", warm)):
                    passes.setdefault((format.name, state, num_workers), []).append(done)
    print(f"{num_pairs:,} images\n")
    print("| features | GB | files | opened per epoch | in memory before a cold pass |\n|---|---:|---:|---:|---:|")
    for format in formats:
        files = files_of(folder / format.folder)
        size = sum(path.stat().st_size for path in files)
        print(
            f"| {format.name} | {size / 1e9:.2f} | {len(files):,} | {opened[format.name]:,} | {left[format.name]:.1%} |"
        )
    for state in ("warm", "cold"):
        columns = [f"{n or 'no'} worker{'s'[: n != 1]}: samples/s | ratio | CPU ms" for n in NUM_WORKERS]
        print(f"\n| {state} | {' | '.join(columns)} |\n|---|{'---:|' * 3 * len(NUM_WORKERS)}")
        for format in formats:
            cells = []
            for num_workers in NUM_WORKERS:
                mine, base = passes[format.name, state, num_workers], passes[BASELINE, state, num_workers]
                rate = statistics.median(one.samples_per_second for one in mine)
                ratio = statistics.median(
                    one.samples_per_second / other.samples_per_second for one, other in zip(mine, base, strict=True)
                )
                cpu_ms = statistics.median(one.cpu_ms for one in mine)
                cells.append(f"{rate:,.0f} | {ratio:.1f} | {cpu_ms:.3f}")
            print(f"| {format.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
