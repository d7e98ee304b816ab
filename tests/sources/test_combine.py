"""Sources after one another, and parts of them: each pair is in one place, and in its order."""

import pickle
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uvit.sources.combine import ConcatSource, ConcatStream, SplitRule, SplitSource, SplitStream
from uvit.sources.shapes import ShapesSource
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, Source

SHAPES = ShapesSource("train", 8)


class Letters(RandomAccessSource):
    """A pair for each letter; upper-case ones cannot be used."""

    def __init__(self, letters: str):
        self.letters = letters

    def __len__(self) -> int:
        return len(self.letters)

    def captions(self, index: int) -> tuple[str, ...]:
        letter = self.letters[index]
        if letter.isupper():
            raise PairError(Problem(letter, "loud", f"{letter} is too loud"))
        return (letter, letter * 2)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self.letters[index], SHAPES[0].image, self.captions(index))

    def problems(self) -> list[Problem]:
        return [Problem(letter, "loud", f"{letter} is too loud") for letter in self.letters if letter.isupper()]


def letters_of(source: RandomAccessSource) -> str:
    found = []
    for row in range(len(source)):
        try:
            found.append(source[row].id)
            assert source.captions(row) == source[row].captions
        except PairError as error:
            found.append(error.problem.id)
    return "".join(found)


def read(stream: Source, start: int = 0, wanted: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, str]]:
    """(position, letter, or - for what is not wanted)"""
    for position, pair in stream.read(start, wanted):
        yield position, "-" if pair is None else pair.problem.id if isinstance(pair, PairError) else pair.id


TEXT = st.text("abcDE", max_size=7)


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_joined_sources_follow_one_another(texts: list[str]) -> None:
    joined = pickle.loads(pickle.dumps(ConcatSource([Letters(text) for text in texts])))
    assert letters_of(joined) == "".join(texts)
    assert [problem.id for problem in joined.problems()] == [letter for letter in "".join(texts) if letter.isupper()]
    for index in (-1, len(joined)):
        with pytest.raises(IndexError):
            _ = joined[index]


@given(TEXT, st.integers(2, 5))
def test_every_kth_is_val_and_the_others_train(text: str, every: int) -> None:
    train, val = (SplitSource(Letters(text), SplitRule(every, split)) for split in ("train", "val"))
    assert letters_of(val) == text[every - 1 :: every]
    assert letters_of(train) == "".join(letter for row, letter in enumerate(text) if row % every != every - 1)
    for part in (train, val):
        assert [problem.id for problem in part.problems()] == [each for each in letters_of(part) if each.isupper()]
        with pytest.raises(IndexError):
            _ = part[len(part)]


@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(0, 9), st.sets(st.integers(0, 20)))
def test_a_joined_stream_starts_anywhere(texts: list[str], start: int, unwanted: set[int]) -> None:
    stream = pickle.loads(pickle.dumps(ConcatStream([Letters(text) for text in texts])))
    whole = "".join(texts)
    expected = [(i, "-" if i in unwanted else letter) for i, letter in enumerate(whole)][start:]
    assert list(read(stream, start, lambda position: position not in unwanted)) == expected
    usable = [letter for letter in whole if letter.islower()]
    assert list(stream.all_captions()) == [caption for letter in usable for caption in (letter, letter * 2)]


@given(TEXT, st.integers(2, 5), st.integers(0, 5), st.sampled_from(["train", "val"]))
def test_a_part_of_a_stream_is_the_part_of_the_source(text: str, every: int, start: int, split: str) -> None:
    rows = SplitRule(every, split)
    expected = letters_of(SplitSource(Letters(text), rows))
    stream = SplitStream(Letters(text), rows)
    assert list(read(stream)) == list(enumerate(expected))
    assert (
        list(read(stream, start, lambda position: position % 2 == 0))
        == [(position, "-" if position % 2 else letter) for position, letter in enumerate(expected)][start:]
    )


def test_what_is_not_wanted_is_not_looked_at() -> None:
    class Counting(Letters):
        num_read = 0

        def __getitem__(self, index: int) -> Pair:
            Counting.num_read += 1
            return super().__getitem__(index)

    stream = ConcatStream([Counting("abc"), Counting("abc")])
    assert [letter for _, letter in read(stream, 1, lambda position: position == 4)] == ["-", "-", "-", "b", "-"]
    assert list(read(SplitStream(stream, SplitRule(3, "val")), 0, lambda position: position == 1)) == [
        (0, "-"),
        (1, "c"),
    ]
    assert Counting.num_read == 2
