"""What is said before an extraction is near the truth."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import info
from uvit.extract import extract as estimate
from uvit.extract.extract import by_kind, check_disk
from uvit.io import format_bytes
from uvit.sources.shapes import ShapesSource
from uvit.sources.types import Problem
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreWriter


def said_size(said: str) -> float:
    found = re.search(r"([\d.]+) KiB to write", said)
    assert found is not None, said
    return float(found[1]) * 1024


@pytest.mark.parametrize("sample", [1000, 50])
def test_the_bytes_are_those_of_the_store(
    tmp_path: Path, sample: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "NUM_SAMPLED_PAIRS", sample)
    source = ShapesSource("train", 8)
    writer = StoreWriter(tmp_path, info(num_source_pairs=648, shard_size=324, flipped=True))
    check_disk(source, writer)
    said = capsys.readouterr().out
    assert said.startswith(f"648 pairs, {'about ' if sample < 648 else ''}2,592 captions: ")
    before = said_size(said)
    for number in range(2):
        with writer.open_shard(number) as shard:
            rows = writer.rows(number)
            captions = [source.captions(row) for row in rows]
            moments = np.zeros((len(rows), 8, 2, 2))
            contexts, tokens = np.zeros((4 * len(rows), 3, 5)), np.zeros((4 * len(rows), 3))
            ids = [source[row].id for row in rows]
            shard.append(EncodedPairs(ids, captions, moments, moments, contexts, tokens), rows.stop)
            shard.finish()
        if number == 0:
            check_disk(source, writer)
            assert said_size(capsys.readouterr().out) == pytest.approx(before / 2, rel=0.1)
    there = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert before == pytest.approx(there, rel=0.05)


def test_in_words() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 5 << 20, 3 << 40)] == [
        "0 bytes",
        "1,023 bytes",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    problems = [Problem("a", kind, "") for kind in ("tiny image", "no caption", "tiny image")]
    assert by_kind(problems) == "1 no caption, 2 tiny image"
