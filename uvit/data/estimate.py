"""Before an extraction: what it will take on the disk. While it runs: when it will be done."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sized
from typing import cast

import numpy as np
from tqdm import tqdm

from uvit.data.store import StoreWriter
from uvit.data.types import PairError, Problem, Source, Stream
from uvit.errors import UserError

SAMPLE = 1000  # pairs whose captions are counted
FIRST_SECONDS = 5.0  # after which the first guess is made at how long it takes


def check_disk(source: Source | Stream, writer: StoreWriter) -> None:
    """Say what there is to extract and what it takes. Raises UserError where the disk has not that much."""
    free = shutil.disk_usage(writer.folder).free
    arrays = writer.info.arrays().values()
    per_pair, per_caption = (
        sum(array.dtype.itemsize * int(np.prod(array.shape)) for array in arrays if array.per_caption == kind)
        for kind in (False, True)
    )
    if not isinstance(source, Sized):
        print(
            f"A stream, its end not known: {size(per_pair)} for each pair and {size(per_caption)} for each caption to"
            f" write, {size(free)} free in {writer.folder}."
        )
        return
    rows = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int)).tolist()
    captions = list[tuple[str, ...]]()
    for row in rows:
        try:
            captions.append(cast(Source, source).captions(row))
        except PairError:
            captions.append(())
    id = "an id of the usual"  # length
    lines = sum(len(json.dumps({"id": id, "captions": each}, ensure_ascii=False).encode()) + 1 for each in captions)
    num_captions = round(len(source) * sum(map(len, captions)) / max(1, len(rows)))
    total = len(source) * (per_pair + lines // max(1, len(rows))) + num_captions * per_caption
    there = sum(path.stat().st_size for path in writer.folder.rglob("*") if path.is_file())
    needed = max(0, total - there)
    about = "about " if len(rows) < len(source) else ""
    print(
        f"{len(source):,} pairs, {about}{num_captions:,} captions: {size(needed)} to write, {size(free)} free in"
        f" {writer.folder}."
    )
    if needed > free:
        raise UserError(
            f"--output_dir {writer.folder}: needs {size(needed)}, and its disk has {size(free)} left; choose another"
            " disk, or store less"
        )


class Progress:
    """A bar, and one line of what to expect once that can be told."""

    def __init__(self, done: int, total: int | None, disable_tqdm: bool):
        self.bar = tqdm(total=total, initial=done, unit="pair", disable=disable_tqdm)
        self.to_do = None if total is None else total - done
        self._first: float | None = None  # when the first batch was there; the rate counts those after it
        self._pairs = 0
        self._said = False

    def add(self, num_pairs: int) -> None:
        self.bar.update(num_pairs)
        if self.to_do is not None:
            self.to_do -= num_pairs
        if self._first is None:
            self._first = time.monotonic()
            return
        self._pairs += num_pairs
        seconds = time.monotonic() - self._first
        if not self._said and seconds >= FIRST_SECONDS and self._pairs:
            rate = self._pairs / seconds
            left = "" if self.to_do is None else f": about {hours(self.to_do / rate)} left"
            tqdm.write(f"{rate:,.1f} pairs/s{left}")
            self._said = True


def hours(seconds: float) -> str:
    """H:MM."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"


def size(num_bytes: float) -> str:
    """In the unit that suits it."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def by_kind(problems: Iterable[Problem]) -> str:
    """`3 broken image, 1 no caption`."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
