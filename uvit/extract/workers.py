"""The processes that read and decode pairs for `uvit extract`, and which pairs they are.

A shard's rows are cut into batches from the shard's first row on. Where a batch ends therefore depends on the shard and
the batch size alone, not on where an extraction was stopped nor on how many processes share it.
"""

import os
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from uvit.errors import UserError
from uvit.images import to_pixels
from uvit.sources.types import Pair, PairError, Problem, Source, Stream


@dataclass(frozen=True)
class ShardPlan:
    """Which rows of the source are still to be dealt with here."""

    shard_size: int
    batch_size: int
    part: int  # this process does shards part, part + num_parts, ...
    num_parts: int
    first_rows: dict[int, int]  # of shards that were begun: the first row not yet dealt with

    def shards(self, num_shards: int) -> range:
        return range(self.part, num_shards, self.num_parts)

    def batch_of(self, row: int) -> tuple[int, range]:
        """(number, rows) of the batch that a row is in, of all the batches of a source without end."""
        shard, within = divmod(row, self.shard_size)
        batch, end = within // self.batch_size, (shard + 1) * self.shard_size
        start = shard * self.shard_size + batch * self.batch_size
        number = shard * -(-self.shard_size // self.batch_size) + batch
        return number, range(start, min(start + self.batch_size, end))

    def to_do(self, batch: range) -> range:
        """What of a batch is to be done here."""
        shard = batch.start // self.shard_size
        if shard % self.num_parts != self.part:
            return range(batch.stop, batch.stop)
        return range(max(batch.start, self.first_rows.get(shard, 0)), batch.stop)

    def batches(self, num_rows: int) -> list[range]:
        """All that is to be done here, in order."""
        found = []
        for shard in self.shards(-(-num_rows // self.shard_size)):
            start = shard * self.shard_size
            for row in range(start, min(start + self.shard_size, num_rows), self.batch_size):
                rows = self.to_do(self.batch_of(row)[1])
                if rows.start < min(rows.stop, num_rows):
                    found.append(range(rows.start, min(rows.stop, num_rows)))
        return found

    def num_rows(self, num_source_pairs: int) -> int:
        """Of the shards of this process, done or not."""
        starts = (shard * self.shard_size for shard in self.shards(-(-num_source_pairs // self.shard_size)))
        return sum(min(self.shard_size, num_source_pairs - start) for start in starts)

    def num_rows_done(self) -> int:
        shards = {shard: row for shard, row in self.first_rows.items() if shard % self.num_parts == self.part}
        return sum(row - shard * self.shard_size for shard, row in shards.items())

    def first_row(self) -> int:
        """The first to be done, of a source without end."""
        shard = self.part
        while (row := self.first_rows.get(shard, shard * self.shard_size)) >= (shard + 1) * self.shard_size:
            shard += self.num_parts
        return row


@dataclass(frozen=True)
class Decoded:
    """The pairs of some rows that can be used; or the mistake that stops all; or the end of a stream."""

    rows: range
    ids: list[str]  # B
    captions: list[tuple[str, ...]]  # B
    # Not a tensor: those come by file descriptor, and a Ctrl-C amid that makes the worker complain.
    pixels: np.ndarray  # (B, 3, R, R) uint8
    problems: tuple[Problem, ...] = ()
    error: UserError | None = None
    num_source_pairs: int | None = None  # of a stream that has ended


@dataclass(frozen=True)
class Preprocessing:
    """How pairs become pixels, and what to do about those that cannot."""

    resolution: int
    crop: str
    resize: str
    min_image_size: int
    skip: bool  # leave out what is wrong; False: stop

    def decoded(self, rows: range, pairs: Iterable[Pair | PairError]) -> Decoded:
        """A mistake is handed over: raised in a worker, it brings a traceback."""
        ids, captions, pixels, problems = [], list[tuple[str, ...]](), [], list[Problem]()
        for pair in pairs:
            found = self._problems(pair)
            if found and not self.skip:
                message = f"{found[0].message}; --on_error skip leaves such pairs out"
                return Decoded(rows, [], [], np.empty(0), error=UserError(message))
            problems += found
            if isinstance(pair, Pair) and not any(problem.left_out for problem in found):
                ids.append(pair.id)
                captions.append(pair.captions)
                pixels.append(to_pixels(pair.image, self.resolution, self.crop, self.resize, key=pair.id))
        shape = (-1, 3, self.resolution, self.resolution)
        return Decoded(rows, ids, captions, np.array(pixels, dtype=np.uint8).reshape(shape), tuple(problems))

    def _problems(self, pair: Pair | PairError) -> tuple[Problem, ...]:
        if isinstance(pair, PairError):
            return (pair.problem,)
        width, height = pair.image.size
        if min(width, height) >= self.min_image_size:
            return pair.problems
        message = f"the image of {pair.id} has {width} x {height} pixels, less than --min_image_size a side"
        return (*pair.problems, Problem(pair.id, "tiny image", message))


def decode_batches(
    source: Source | Stream, plan: ShardPlan, reading: Preprocessing, num_workers: int
) -> Generator[Decoded]:
    """All batches of the plan, in order; of a stream, its end comes last. Raises UserError as the source does.

    The workers start here and now, before the caller has threads.
    """
    dataset: Dataset[Decoded]
    if isinstance(source, Sized):
        items = plan.batches(len(source))
        dataset, num_workers = _Batches(cast(Source, source), reading), min(num_workers, len(items))
    else:
        dataset, items = _Stream(source, plan, reading), None
    with warnings.catch_warnings():  # more of them than processors may well be right: they wait for disks and networks
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[Decoded] = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            worker_init_fn=partial(_begin, os.getpid()),
        )
        return _unpacked(iter(loader))


def _begin(parent: int, worker: int) -> None:
    """In a worker: end when the main process does, even if that was killed.

    The loader sees to that too, but not while a worker waits for someone to take its last batch.
    """
    # Ctrl-C reaches all processes of a terminal, and only the main one knows what to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _unpacked(batches: Iterator[Decoded]) -> Generator[Decoded]:
    try:
        for batch in batches:
            if batch.error:
                raise batch.error
            if batch.rows or batch.num_source_pairs is not None:
                yield batch
            if batch.num_source_pairs is not None:  # the other workers find the same end
                return
    finally:
        del batches  # the workers end now; left to the garbage collector, each is waited for in vain for seconds


class _Batches(Dataset[Decoded]):
    """Items are asked for by their rows."""

    def __init__(self, source: Source, reading: Preprocessing):
        self.source, self.reading = source, reading

    def __getitem__(self, rows: range) -> Decoded:
        try:
            return self.reading.decoded(rows, map(self._pair, rows))
        except UserError as error:
            return Decoded(rows, [], [], np.empty(0), error=error)

    def _pair(self, row: int) -> Pair | PairError:
        try:
            return self.source[row]
        except PairError as error:
            return error


class _Stream(IterableDataset[Decoded]):
    """Every worker runs through the stream, and decodes each so-manieth batch.

    The loader takes from the workers in turn, so batch i must be the next item of worker i modulo their number. A batch
    that is not to be done here takes its turn too, without rows.
    """

    def __init__(self, stream: Stream, plan: ShardPlan, reading: Preprocessing):
        self.stream, self.plan, self.reading = stream, plan, reading

    def __iter__(self) -> Iterator[Decoded]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        end = start = self.plan.first_row()
        first, _ = self.plan.batch_of(start)

        def wanted(row: int) -> bool:
            number, rows = self.plan.batch_of(row)
            return (number - first) % num_workers == worker and row in self.plan.to_do(rows)

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
                to_do = self.plan.to_do(rows)
                batch = self.reading.decoded(to_do, until(rows.stop))
                if (number - first) % num_workers == worker:
                    yield batch if end == rows.stop else replace(batch, rows=range(to_do.start, max(to_do.start, end)))
                if batch.error:
                    return
                if end < rows.stop:
                    break
            if end == start:  # it may have ended before
                end = sum(1 for _ in self.stream.read(0, lambda row: False))
            yield replace(self.reading.decoded(range(end, end), []), num_source_pairs=end)
        except UserError as error:
            yield Decoded(range(end, end), [], [], np.empty(0), error=error)
