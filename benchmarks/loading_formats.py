"""The formats that loading.py compares: how each is written, and how it is read."""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=TAR_SIZE, maxsize=1 << 40, verbose=0) as writer:
        for first, moments, contexts in make_images(num_pairs):
            moments, contexts = moments.astype(np.float16), contexts.astype(np.float16)
            for i, (one, its_contexts) in enumerate(zip(moments, contexts, strict=True), first):
                captions = {f"context{k}.npy": context for k, context in enumerate(its_contexts)}
                writer.write({"__key__": f"{i:08d}", "moments.npy": one, **captions})


def write_arrow(folder: Path, num_pairs: int) -> None:
    """Two tables, of images and of captions: in one, each read would fetch all text embeddings of an image."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

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


def write_litdata(folder: Path, num_pairs: int) -> None:
    """All text embeddings of an image are one item with its moments."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer, size = BinaryWriter(str(folder), chunk_bytes=2**26), 0
    for first, moments, contexts in make_images(num_pairs):
        moments, contexts = moments.astype(np.float16), contexts.astype(np.float16)
        for i, pair in enumerate(zip(moments, contexts, strict=True), first):
            writer[i] = pair
            size += 1
    assert size == num_pairs
    writer.done()
    writer.merge()


def write_mds(folder: Path, num_pairs: int) -> None:
    """The same."""
    from streaming import MDSWriter

    columns = {
        "moments": f"ndarray:float16:{','.join(map(str, MOMENTS))}",
        "contexts": f"ndarray:float16:{','.join(map(str, (NUM_CAPTIONS, *CONTEXT)))}",
    }
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for _, moments, contexts in make_images(num_pairs):
            for one, its_contexts in zip(moments.astype(np.float16), contexts.astype(np.float16), strict=True):
                writer.write({"moments": one, "contexts": its_contexts})


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
    import webdataset

    random = np.random.default_rng(seed)

    def decode(sample: dict[str, bytes]) -> tuple[np.ndarray, ...]:
        names = ("moments.npy", f"context{random.integers(NUM_CAPTIONS)}.npy")
        return tuple(np.load(io.BytesIO(sample[name])) for name in names)

    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(urls * num_epochs, shardshuffle=len(urls), seed=seed, empty_check=False)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).map(decode).batched(BATCH_SIZE)
    return DataLoader(dataset, batch_size=None, num_workers=num_workers)


def load_arrow(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
    import datasets

    moments, contexts = (
        datasets.Dataset.from_file(f"{folder}/{name}.arrow").with_format("numpy") for name in ("moments", "contexts")
    )

    def read(rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, ...]:
        captions = rows * NUM_CAPTIONS + (draws * NUM_CAPTIONS).astype(np.int64)
        return moments[rows]["moments"], contexts[captions]["context"]

    return DataLoader(Batched(epochs(num_pairs, num_epochs, seed), read), batch_size=None, num_workers=num_workers)


def pick_context(moments: np.ndarray, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies, as the arrays may be views of memory that cannot be written."""
    return np.array(moments), np.array(contexts[int(torch.randint(NUM_CAPTIONS, ()))])


def load_litdata(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    class Pairs(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
            return pick_context(*super().__getitem__(index))

    dataset = Pairs(str(folder), shuffle=True, seed=seed)
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers)
    for _ in range(num_epochs):
        yield from loader


def load_mds(folder: Path, num_pairs: int, num_epochs: int, num_workers: int, seed: int) -> Iterable[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Pairs(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
            sample = super().__getitem__(index)
            return pick_context(sample["moments"], sample["contexts"])

    clean_stale_shared_memory()
    dataset = Pairs(local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=BATCH_SIZE)
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=num_workers)
    for _ in range(num_epochs):
        yield from loader


@dataclass(frozen=True)
class Format:
    name: str
    folder: str
    write: Callable[[Path, int], None]
    load: Callable[..., Iterable[Any]]
    warm_epochs: int  # so that each pass takes about a second, beside which its beginning counts for little
    needs: str | None = None  # a package that is not among uvit's


FORMATS = [
    Format(BASELINE, "old", write_npy, load_textbook, 3),
    Format(".npy features, uvit's reader", "old", write_npy, load_features(NpyFeatures), 3),
    Format("feature store", "store", write_store, load_features(lambda folder: FeatureStore(folder / "train")), 40),
    Format("WebDataset tars", "tars", write_tars, load_tars, 2, "webdataset"),
    Format("Hugging Face Arrow", "arrow", write_arrow, load_arrow, 3, "datasets"),
    Format("litdata", "litdata", write_litdata, load_litdata, 3, "litdata"),
    Format("MosaicML streaming", "mds", write_mds, load_mds, 3, "streaming"),
]


def installed_formats() -> list[Format]:
    """Those whose package is installed. Prints the others."""
    found = []
    for format in FORMATS:
        if format.needs and find_spec(format.needs) is None:
            print(f"{format.name}: left out, because the package {format.needs} is not installed.")
        else:
            found.append(format)
    return found
