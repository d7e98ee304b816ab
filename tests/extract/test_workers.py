"""Every row is dealt with once, in batches that neither stops nor parts nor workers change, in order."""

import multiprocessing
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uvit.errors import UserError
from uvit.extract.workers import Preprocessing, ShardPlan, decode_batches
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, Source

READING = Preprocessing(resolution=4, crop="center", resize="lanczos", icc="srgb", min_image_size=2, skip=True)


class Numbers(RandomAccessSource):
    """Pair i is all i."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Pair:
        if index == 5:
            raise PairError(Problem("5", "broken image", "5.png is broken"))
        if index == 400:
            raise UserError("the disk is gone")
        return Pair(str(index), Image.new("RGB", (4, 4), (index, index, index)), (str(index),))

    def captions(self, index: int) -> tuple[str, ...]:
        return self[index].captions

    def problems(self) -> list[Problem]:
        return []


class NumbersInARow(Source):
    """The same as a stream; how many were decoded cannot be more than were wanted."""

    def __init__(self, length: int):
        self.numbers = Numbers(length)

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        for i in range(start, len(self.numbers)):
            try:
                yield i, self.numbers[i] if wanted(i) else None
            except PairError as error:
                yield i, error

    def all_captions(self) -> Iterator[str]:
        yield from ()


sizes = st.integers(1, 9)


@settings(max_examples=200, deadline=None)
@given(num_rows=st.integers(1, 60), shard_size=sizes, batch_size=sizes, num_parts=st.integers(1, 4), data=st.data())
def test_the_parts_share_all_rows_and_cut_them_alike(
    num_rows: int, shard_size: int, batch_size: int, num_parts: int, data: st.DataObject
) -> None:
    whole = ShardPlan(shard_size, batch_size, 0, 1, {}).batches(num_rows)
    assert [row for rows in whole for row in rows] == list(range(num_rows))
    assert all(rows.start // shard_size == (rows.stop - 1) // shard_size for rows in whole), "crosses shards"
    parts = [ShardPlan(shard_size, batch_size, part, num_parts, {}) for part in range(num_parts)]
    assert sorted((rows for plan in parts for rows in plan.batches(num_rows)), key=lambda rows: rows.start) == whole
    assert sum(plan.num_rows(num_rows) for plan in parts) == num_rows

    stops = {}  # a shard begun with this batch size stops where a batch ends
    for shard in data.draw(st.sets(st.integers(0, (num_rows - 1) // shard_size))):
        ends = [rows.stop for rows in whole if rows.start // shard_size == shard]
        stops[shard] = data.draw(st.sampled_from([shard * shard_size, *ends]))
    left = ShardPlan(shard_size, batch_size, 0, 1, stops)
    assert left.batches(num_rows) == [rows for rows in whole if rows.start >= stops.get(rows.start // shard_size, 0)]
    assert sum(map(len, left.batches(num_rows))) + left.num_rows_done() == num_rows


@settings(max_examples=100, deadline=None)
@given(num_rows=st.integers(0, 40), shard_size=sizes, batch_size=sizes, part=st.integers(0, 2), data=st.data())
def test_a_stream_comes_in_the_batches_of_an_index(
    num_rows: int, shard_size: int, batch_size: int, part: int, data: st.DataObject
) -> None:
    first_rows = {
        shard: shard * shard_size + data.draw(st.integers(0, min(shard_size, num_rows - shard * shard_size)))
        for shard in data.draw(st.sets(st.integers(0, max(0, num_rows - 1) // shard_size)))
    }
    plan = ShardPlan(shard_size, batch_size, part, 3, first_rows)
    *batches, end = decode_batches(NumbersInARow(num_rows), plan, READING, num_workers=0)
    assert end.num_source_pairs == num_rows
    assert [batch.rows for batch in batches] == plan.batches(num_rows)
    for batch in batches:
        assert batch.ids == [str(row) for row in batch.rows if row != 5]
        assert [problem.id for problem in batch.problems] == ["5"] * (5 in batch.rows)


@pytest.mark.parametrize("source", [Numbers(47), NumbersInARow(47), Numbers(40), NumbersInARow(40)])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_workers_keep_the_order(source: Numbers | NumbersInARow, num_workers: int) -> None:
    plan = ShardPlan(10, 3, 0, 2, {0: 10, 2: 24})
    batches = [batch for batch in decode_batches(source, plan, READING, num_workers) if batch.rows]
    length = len(source) if isinstance(source, Numbers) else len(source.numbers)
    assert [batch.rows for batch in batches] == plan.batches(length)
    assert batches[0].rows == range(24, 26), "cut where the batch ends that was begun before"
    for batch in batches:
        assert batch.captions == [(str(row),) for row in batch.rows]
        assert (batch.pixels == np.array(batch.rows)[:, None, None, None]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", [Numbers(9), NumbersInARow(9)])
def test_a_problem_stops_it_where_that_is_asked(source: Numbers | NumbersInARow, num_workers: int) -> None:
    before = multiprocessing.active_children()  # of other tests
    strict = Preprocessing(4, "center", "lanczos", "srgb", 2, skip=False)
    batches = decode_batches(source, ShardPlan(100, 2, 0, 1, {}), strict, num_workers)
    assert [next(batches).rows, next(batches).rows] == [range(2), range(2, 4)]
    with pytest.raises(UserError, match=r"^5\.png is broken; --on_error skip skips such pairs"):
        next(batches)
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("source", [Numbers(500), NumbersInARow(500)])
def test_what_no_pair_is_to_blame_for_stops_it_always(source: Numbers | NumbersInARow, num_workers: int) -> None:
    with pytest.raises(UserError, match="the disk is gone"):
        list(decode_batches(source, ShardPlan(1000, 50, 0, 1, {0: 300}), READING, num_workers))


def test_what_was_wrong_with_a_pair_comes_along() -> None:
    empty = Problem("a", "empty caption", "a: a caption is empty", left_out=False)
    pairs = [
        Pair("a", Image.new("RGB", (9, 9)), ("one",), (empty,)),
        Pair("b", Image.new("RGB", (9, 1)), ("two",)),
        PairError(Problem("c", "broken image", "c is broken")),
    ]
    decoded = READING.preprocess(range(3), pairs)
    assert (decoded.ids, decoded.captions, decoded.pixels.shape) == (["a"], [("one",)], (1, 3, 4, 4))
    assert [(problem.id, problem.kind) for problem in decoded.problems] == [
        ("a", "empty caption"),
        ("b", "tiny image"),
        ("c", "broken image"),
    ]
    assert READING.preprocess(range(1), pairs[2:]).pixels.shape == (0, 3, 4, 4)
