"""The worker processes of `uvit extract`, which read and decode pairs, and the plan that assigns the pairs.

The rows of a shard are divided into batches from its first row on. The end of a batch therefore depends only on the
shard and the batch size. It does not depend on where an extraction was stopped, or on how many processes share it.
"""

import os
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from uvit.errors import UserError
from uvit.images import to_pixels
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, Source


@dataclass(frozen=True)
class ShardPlan:
    """Which rows of the source this process still has to extract."""

    shard_size: int
    batch_size: int
    part: int  # this process writes the shards part, part + num_parts, ...
    num_parts: int
    first_rows: dict[int, int]  # {shard that was started: its first row that is not yet processed}

    def shards(self, num_shards: int) -> range:
        return range(self.part, num_shards, self.num_parts)

    def batch_of(self, row: int) -> tuple[int, range]:
        """(number, rows) of the batch that contains a row. The batches are numbered as if the source had no end."""
        shard, within = divmod(row, self.shard_size)
        batch, end = within // self.batch_size, (shard + 1) * self.shard_size
        start = shard * self.shard_size + batch * self.batch_size
        number = shard * -(-self.shard_size // self.batch_size) + batch
        return number, range(start, min(start + self.batch_size, end))

    def remaining(self, batch: range) -> range:
        """The rows of a batch that this process still has to extract."""
        shard = batch.start // self.shard_size
        if shard % self.num_parts != self.part:
            return range(batch.stop, batch.stop)
        return range(max(batch.start, self.first_rows.get(shard, 0)), batch.stop)

    def batches(self, num_rows: int) -> list[range]:
        """All batches that this process still has to extract, in order."""
        batches = []
        for shard in self.shards(-(-num_rows // self.shard_size)):
            start = shard * self.shard_size
            for row in range(start, min(start + self.shard_size, num_rows), self.batch_size):
                rows = self.remaining(self.batch_of(row)[1])
                if rows.start < min(rows.stop, num_rows):
                    batches.append(range(rows.start, min(rows.stop, num_rows)))
        return batches

    def num_rows(self, num_source_pairs: int) -> int:
        """The number of rows in this process's shards, done or not."""
        starts = (shard * self.shard_size for shard in self.shards(-(-num_source_pairs // self.shard_size)))
        return sum(min(self.shard_size, num_source_pairs - start) for start in starts)

    def num_rows_done(self) -> int:
        shards = {shard: row for shard, row in self.first_rows.items() if shard % self.num_parts == self.part}
        return sum(row - shard * self.shard_size for shard, row in shards.items())

    def first_row(self) -> int:
        """The first row that this process still has to extract, as if the source had no end."""
        shard = self.part
        while (row := self.first_rows.get(shard, shard * self.shard_size)) >= (shard + 1) * self.shard_size:
            shard += self.num_parts
        return row


@dataclass(frozen=True)
class Decoded:
    """The usable pairs of some rows; or the error that stops the extraction; or the end of a stream."""

    rows: range
    ids: list[str]  # B
    captions: list[tuple[str, ...]]  # B
    # Not a tensor: tensors are passed by file descriptor, and a Ctrl-C during that makes the worker print an error.
    pixels: np.ndarray  # (B, 3, R, R) uint8
    problems: tuple[Problem, ...] = ()
    error: UserError | None = None
    num_source_pairs: int | None = None  # set at the end of a stream


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared, and what happens to bad pairs."""

    resolution: int
    crop: str
    resize: str
    icc: str
    min_image_size: int
    skip: bool  # skip bad pairs; False: stop at the first

    def preprocess(self, rows: range, pairs: Iterable[Pair | PairError]) -> Decoded:
        """Prepare the pairs of some rows. An error is returned, not raised: a worker would print its traceback."""
        ids, captions, pixels, problems = [], list[tuple[str, ...]](), [], list[Problem]()
        for pair in pairs:
            its_problems = self._problems(pair)
            if its_problems and not self.skip:
                message = f"{its_problems[0].message}; --on_error skip skips such pairs"
                return Decoded(rows, [], [], np.empty(0), error=UserError(message))
            problems += its_problems
            if isinstance(pair, Pair) and not any(problem.left_out for problem in its_problems):
                ids.append(pair.id)
                captions.append(pair.captions)
                pixels.append(to_pixels(pair.image, self.resolution, self.crop, self.resize, pair.id, self.icc))
        shape = (-1, 3, self.resolution, self.resolution)
        return Decoded(rows, ids, captions, np.array(pixels, dtype=np.uint8).reshape(shape), tuple(problems))

    def _problems(self, pair: Pair | PairError) -> tuple[Problem, ...]:
        if isinstance(pair, PairError):
            return (pair.problem,)
        width, height = pair.image.size
        if min(width, height) >= self.min_image_size:
            return pair.problems
        message = (
            f"the image of {pair.id} has {width} x {height} pixels, less than --min_image_size {self.min_image_size}"
        )
        return (*pair.problems, Problem(pair.id, "tiny image", message))


def decode_batches(
    source: Source, plan: ShardPlan, preprocessing: Preprocessing, num_workers: int
) -> Generator[Decoded]:
    """All batches of the plan, in order. The last item of a stream tells its end. Raises the source's UserError.

    The workers start in this call, before the caller starts threads.
    """
    dataset: Dataset[Decoded]
    if isinstance(source, RandomAccessSource):
        items = plan.batches(len(source))
        dataset, num_workers = _BatchDataset(source, preprocessing), min(num_workers, len(items))
    else:
        dataset, items = _StreamDataset(source, plan, preprocessing), None
    with warnings.catch_warnings():  # more workers than cores can be right: they wait for disks and networks
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[Decoded] = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            worker_init_fn=partial(_init_worker, os.getpid()),
        )
        return _raise_errors(iter(loader))


def _init_worker(parent: int, worker: int) -> None:
    """Runs in a worker, and ends it when the main process ends, even if that was killed.

    The DataLoader does this too, but not while a worker waits to hand over its last batch.
    """
    # Ctrl-C reaches all processes of a terminal, but only the main process knows what to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _raise_errors(batches: Iterator[Decoded]) -> Generator[Decoded]:
    try:
        for batch in batches:
            if batch.error:
                raise batch.error
            if batch.rows or batch.num_source_pairs is not None:
                yield batch
            if batch.num_source_pairs is not None:  # the other workers find the same end
                return
    finally:
        del batches  # ends the workers now; the garbage collector would wait seconds for each


class _BatchDataset(Dataset[Decoded]):
    """A source with random access. The index of an item is the range of its rows."""

    def __init__(self, source: RandomAccessSource, preprocessing: Preprocessing):
        self.source, self.preprocessing = source, preprocessing

    def __getitem__(self, rows: range) -> Decoded:
        try:
            return self.preprocessing.preprocess(rows, map(self._pair, rows))
        except UserError as error:
            return Decoded(rows, [], [], np.empty(0), error=error)

    def _pair(self, row: int) -> Pair | PairError:
        try:
            return self.source[row]
        except PairError as error:
            return error


class _StreamDataset(IterableDataset[Decoded]):
    """Every worker reads the whole stream. Worker w of n decodes the batches w, w + n, w + 2 n, ...

    The DataLoader takes items from the workers in turn, so worker w must yield an item for each of its batches. A batch
    that this process does not extract is an item without rows.
    """

    def __init__(self, stream: Source, plan: ShardPlan, preprocessing: Preprocessing):
        self.stream, self.plan, self.preprocessing = stream, plan, preprocessing

    def __iter__(self) -> Iterator[Decoded]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        end = start = self.plan.first_row()
        first, _ = self.plan.batch_of(start)

        def wanted(row: int) -> bool:
            number, rows = self.plan.batch_of(row)
            return (number - first) % num_workers == worker and row in self.plan.remaining(rows)

        def until(stop: int) -> Iterator[Pair | PairError]:
            nonlocal end
            while end < stop and (item := next(stream, None)):
                end = item[0] + 1
                if item[1] is not None:
                    yield item[1]

        try:
            stream = self.stream.read(start, wanted)
            while True:
                number, rows = self.plan.batch_of(end)
                remaining = self.plan.remaining(rows)
                batch = self.preprocessing.preprocess(remaining, until(rows.stop))
                if (number - first) % num_workers == worker:
                    stop = remaining.stop if end == rows.stop else max(remaining.start, end)
                    yield replace(batch, rows=range(remaining.start, stop))
                if batch.error:
                    return
                if end < rows.stop:
                    break
            if end == start:  # the stream may end before `start`
                end = sum(1 for _ in self.stream.read(0, lambda row: False))
            yield replace(self.preprocessing.preprocess(range(end, end), []), num_source_pairs=end)
        except UserError as error:
            yield Decoded(range(end, end), [], [], np.empty(0), error=error)
