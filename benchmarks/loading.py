"""Reading features for training: the feature store, `.npy` features, WebDataset tars and Hugging Face Arrow.

    python benchmarks/loading.py [--num_pairs 1024] [--folder DIR] [--repetitions 3]

All hold the same arrays, at COCO's shapes: moments 8x32x32 and five text embeddings of 77x768 for each image. All
deliver the same samples: every image once per epoch, in random order, with one of its text embeddings, in batches of
32. The `.npy` features (U-ViT layout) are float32, as usual; the others are float16. Ratios are to `.npy` features as
they are commonly read: `np.load` for each array of each item, and DataLoader's own collate.

Repetitions are interleaved: in each, every reader runs once for each number of workers, so that other load on the
machine affects all alike; the table has medians, and medians of each repetition's own ratios. Times are of a whole
pass, from the start to the last batch. Workers are the processes of a DataLoader; uvit's own are threads. Warm: as many
epochs as take about a second, after the files were read from end to end, so that all are in memory. Cold: one epoch,
after the page cache was dropped (as root, directory entries too; the first line says how much stayed cached). What a
cold pass leaves in memory is in smaller pieces than what `cat` leaves: copying it takes up to twice as long.

Needs `webdataset` and `datasets`, and 3.1 MB per image on disk, which it frees at the end: 3.2 GB for 1,024.
"""

import argparse
import contextlib
import ctypes
import io
import mmap
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import webdataset
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import DataLoader, Dataset

from uvit.store.npy_layout import NpyFeatures
from uvit.store.reader import FeatureStore
from uvit.store.shard import EncodedPairs
from uvit.store.types import Features
from uvit.store.writer import StoreInfo, StoreWriter
from uvit.train.loader import prefetch_in_threads

MOMENTS, CONTEXT, NUM_CAPTIONS = (8, 32, 32), (77, 768), 5
SHARD_SIZE, TAR_SIZE, BATCH_SIZE, SHUFFLE_BUFFER = 1024, 256, 32, 256
BLOCK = 64  # images that are made at a time
NUM_WORKERS = (0, 1, 2)
BASELINE = ".npy features, np.load for each item"


# What is written


def make_images(num_pairs: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first number, moments (b, 8, 32, 32), contexts (b, 5, 77, 768)), float32 with float16's values.

    Random, except for the first two numbers of each array, which encode the number of its image.
    """
    random = np.random.default_rng(0)
    moments, contexts = (
        random.standard_normal((BLOCK, *shape), dtype=np.float32).astype(np.float16).astype(np.float32)
        for shape in (MOMENTS, (NUM_CAPTIONS, *CONTEXT))
    )
    for first in range(0, num_pairs, BLOCK):
        size = min(BLOCK, num_pairs - first)
        numbers = np.stack(np.divmod(np.arange(first, first + size), SHARD_SIZE), axis=1)
        moments[:size, 0, 0, :2] = numbers
        contexts[:size, :, 0, :2] = numbers[:, None]
        yield first, moments[:size], contexts[:size]


def number_of(array: Any) -> np.ndarray:
    """The image numbers of (B, ...) arrays."""
    marks = np.asarray(array).reshape(len(array), -1)[:, :2].astype(np.int64)
    return marks[:, 0] * SHARD_SIZE + marks[:, 1]


def write_npy(folder: Path, num_pairs: int) -> None:
    (folder / "train").mkdir(parents=True)
    for first, moments, contexts in make_images(num_pairs):
        for i, (one, its_contexts) in enumerate(zip(moments, contexts, strict=True), first):
            np.save(folder / "train" / f"{i}.npy", one)
            for k, context in enumerate(its_contexts):
                np.save(folder / "train" / f"{i}_{k}.npy", context)
    np.save(folder / "empty_context.npy", np.zeros(CONTEXT, np.float32))


def write_store(folder: Path, num_pairs: int) -> None:
    encoder = {"name": "none", "sha256": ""}
    info = StoreInfo(
        num_source_pairs=num_pairs,
        shard_size=SHARD_SIZE,
        dtype="float16",
        moments_shape=MOMENTS,
        flipped=False,
        context_shape=CONTEXT,
        num_tokens=CONTEXT[0],
        token_dtype=None,
        latent_scale=0.2301,
        split="train",
        source={"source": "random numbers"},
        vae=encoder,
        text_encoder=encoder,
        tokenizer=None,
    )
    writer, parts = StoreWriter(folder / "train", info), make_images(num_pairs)
    for number in range(-(-num_pairs // SHARD_SIZE)):
        with writer.open_shard(number) as shard:
            while shard.next_row < writer.rows(number).stop:
                first, moments, contexts = next(parts)
                ids = [str(i) for i in range(first, first + len(moments))]
                captions = [("a caption",) * NUM_CAPTIONS] * len(ids)
                part = EncodedPairs(ids, captions, moments, None, contexts.reshape(-1, *CONTEXT), None)
                shard.append(part, next_row=first + len(ids))
            shard.finish()
    writer.finish(np.zeros(CONTEXT, np.float16), None)


def write_tars(folder: Path, num_pairs: int) -> None:
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=TAR_SIZE, maxsize=1 << 40, verbose=0) as writer:
        for first, moments, contexts in make_images(num_pairs):
            moments, contexts = moments.astype(np.float16), contexts.astype(np.float16)
            for i, (one, its_contexts) in enumerate(zip(moments, contexts, strict=True), first):
                captions = {f"context{k}.npy": context for k, context in enumerate(its_contexts)}
                writer.write({"__key__": f"{i:08d}", "moments.npy": one, **captions})


def write_arrow(folder: Path, num_pairs: int) -> None:
    """Two tables, of images and of captions: in one, each read would fetch all text embeddings of an image."""
    folder.mkdir(parents=True)
    features = [
        datasets.Features({"moments": datasets.Array3D(MOMENTS, "float16")}),
        datasets.Features({"context": datasets.Array2D(CONTEXT, "float16")}),
    ]
    writers = [
        ArrowWriter(path=f"{folder}/{name}.arrow", features=feature, writer_batch_size=BLOCK)
        for name, feature in zip(("moments", "contexts"), features, strict=True)
    ]
    for _, moments, contexts in make_images(num_pairs):
        writers[0].write_batch({"moments": list(moments.astype(np.float16))})
        writers[1].write_batch({"context": list(contexts.astype(np.float16).reshape(-1, *CONTEXT))})
    for writer in writers:
        writer.finalize()


# How it is read. Each reader makes a DataLoader of `num_epochs` epochs, whose batches are (moments, contexts).


class Textbook(Dataset[tuple[np.ndarray, np.ndarray]]):
    """A file for each array, an array for each item."""

    def __init__(self, folder: Path, num_pairs: int):
        self.folder, self.num_pairs = folder / "train", num_pairs

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        k = int(torch.randint(NUM_CAPTIONS, ()))
        return np.load(self.folder / f"{index}.npy"), np.load(self.folder / f"{index}_{k}.npy")


class Batched(Dataset[tuple[torch.Tensor, ...]]):
    """Items are batches, whose rows and captions are chosen beforehand."""

    def __init__(self, rows: np.ndarray, read: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]):
        self.rows, self.read = rows, read
        self.draws = np.random.default_rng(len(rows)).random(len(rows))

    def __len__(self) -> int:
        return -(-len(self.rows) // BATCH_SIZE)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        here = slice(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
        return tuple(map(torch.from_numpy, self.read(self.rows[here], self.draws[here])))


def epochs(num_pairs: int, num_epochs: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(num_pairs) for _ in range(num_epochs)])


def load_textbook(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
    order = epochs(num_pairs, num_epochs, seed).tolist()
    dataset = Textbook(folder, num_pairs)
    return DataLoader(dataset, BATCH_SIZE, sampler=order, num_workers=num_workers)


def load_features(open_them: Callable[[Path], Features]) -> Callable[..., Iterable[Any]]:
    """As `uvit train` loads: its workers are threads."""

    def load(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
        features = open_them(folder)

        def read(rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, ...]:
            batch = features.read(rows, draws)
            assert batch.context is not None
            return batch.moments, batch.context

        batches = Batched(epochs(num_pairs, num_epochs, seed), read)
        return prefetch_in_threads(batches.__getitem__, range(len(batches)), num_workers)

    return load


def load_tars(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
    """All five text embeddings are read, as a tar is read from beginning to end; one of them is decoded."""
    random = np.random.default_rng(seed)

    def decode(sample: dict[str, bytes]) -> tuple[np.ndarray, ...]:
        names = ("moments.npy", f"context{random.integers(NUM_CAPTIONS)}.npy")
        return tuple(np.load(io.BytesIO(sample[name])) for name in names)

    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(urls * num_epochs, shardshuffle=len(urls), seed=seed, empty_check=False)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).map(decode).batched(BATCH_SIZE)
    return DataLoader(dataset, batch_size=None, num_workers=num_workers)


def load_arrow(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
    moments, contexts = (
        datasets.Dataset.from_file(f"{folder}/{name}.arrow").with_format("numpy") for name in ("moments", "contexts")
    )

    def read(rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, ...]:
        captions = rows * NUM_CAPTIONS + (draws * NUM_CAPTIONS).astype(np.int64)
        return moments[rows]["moments"], contexts[captions]["context"]

    return DataLoader(Batched(epochs(num_pairs, num_epochs, seed), read), batch_size=None, num_workers=num_workers)


@dataclass(frozen=True)
class Format:
    name: str
    folder: str
    write: Callable[[Path, int], None]
    load: Callable[..., Iterable[Any]]
    warm_epochs: int  # so that each pass takes about a second, beside which its beginning counts for little


FORMATS = [
    Format(BASELINE, "old", write_npy, load_textbook, 3),
    Format(".npy features, uvit's reader", "old", write_npy, load_features(NpyFeatures), 3),
    Format("feature store", "store", write_store, load_features(lambda folder: FeatureStore(folder / "train")), 40),
    Format("WebDataset tars", "tars", write_tars, load_tars, 2),
    Format("Hugging Face Arrow", "arrow", write_arrow, load_arrow, 3),
]


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
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="loading-", dir=options.folder) as folder:
        run(Path(folder), options.num_pairs, options.repetitions)


def run(folder: Path, num_pairs: int, repetitions: int) -> None:
    opened = {}
    for format in FORMATS:
        if not (folder / format.folder).exists():
            format.write(folder / format.folder, num_pairs)
        check(format, folder, num_pairs)
        opened[format.name] = count_opened(format, folder, num_pairs)
    passes: dict[tuple[str, str, int], list[Pass]] = {}
    left = []
    for repetition in range(repetitions):
        for num_workers in NUM_WORKERS:
            for format in FORMATS:
                forget(folder / format.folder)
                warm_up(folder / format.folder)
                warm = measure(format, folder, num_pairs, format.warm_epochs, num_workers, repetition)
                left.append(forget(folder / format.folder))
                cold = measure(format, folder, num_pairs, 1, num_workers, repetition)
                for state, done in (("cold", cold), ("warm", warm)):
                    passes.setdefault((format.name, state, num_workers), []).append(done)
    print(f"{num_pairs:,} images; at most {max(left):.1%} of the files were in memory before cold passes.\n")
    print("| features | GB | files | opened per epoch |\n|---|---:|---:|---:|")
    for format in FORMATS:
        files = files_of(folder / format.folder)
        size = sum(path.stat().st_size for path in files)
        print(f"| {format.name} | {size / 1e9:.2f} | {len(files):,} | {opened[format.name]:,} |")
    for state in ("warm", "cold"):
        columns = [f"{n or 'no'} worker{'s'[: n != 1]}: samples/s | ratio | CPU ms" for n in NUM_WORKERS]
        print(f"\n| {state} | {' | '.join(columns)} |\n|---|{'---:|' * 3 * len(NUM_WORKERS)}")
        for format in FORMATS:
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
