"""What img2dataset leaves, in each of its formats: what it got is read, what it did not get is named and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sources.pictures import png, write_tar
from uvit.errors import UserError
from uvit.sources.img2dataset import failed_rows
from uvit.sources.open import open_source, require_random_access
from uvit.sources.types import PairError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [  # caption, status, error
    ("one", "success", None),
    ("two", "failed_to_download", "HTTP Error 404: Not Found"),
    (None, "success", None),
    ("four", "failed_to_resize", "image decoding error"),
    ("five", "success", None),
]
NO_IMAGE = "failed_to_download: HTTP Error 404: Not Found: http://example.org/1.jpg"


def write_table(folder: Path, shard: int, with_images: bool = False) -> None:
    columns: dict[str, Any] = {
        "url": [f"http://example.org/{row}.jpg" for row in range(len(ROWS))],
        "caption": [caption for caption, _, _ in ROWS],
        "key": [f"{shard:05d}{row:04d}" for row in range(len(ROWS))],
        "status": [status for _, status, _ in ROWS],
        "error_message": [error for _, _, error in ROWS],
        "width": arrow.array([8 if status == "success" else None for _, status, _ in ROWS], arrow.int32()),
    }
    if with_images:
        images = [png("red", format="JPEG") if status == "success" else None for _, status, _ in ROWS]
        columns["jpg"] = arrow.array(images, arrow.binary())
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), folder / f"{shard:05d}.parquet")
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(ROWS), "successes": 3}))


def members(shard: int) -> list[tuple[str, bytes]]:
    return [
        (f"{shard:05d}{row:04d}.{suffix}", data)
        for row, (caption, status, _) in enumerate(ROWS)
        if status == "success"
        for suffix, data in (
            ("jpg", png("red", format="JPEG")),
            ("txt", (caption or "").encode()),
            ("json", json.dumps({"caption": caption, "status": status}).encode()),
        )
    ]


def write_webdataset(folder: Path, shard: int) -> None:
    write_table(folder, shard)
    write_tar(folder / f"{shard:05d}.tar", members(shard))


def write_files(folder: Path, shard: int) -> None:
    write_table(folder, shard)
    (folder / f"{shard:05d}").mkdir()
    for name, data in members(shard):
        (folder / f"{shard:05d}" / name).write_bytes(data)


def write_parquet(folder: Path, shard: int) -> None:
    write_table(folder, shard, with_images=True)


@pytest.mark.parametrize("write", [write_webdataset, write_files, write_parquet])
def test_every_row_is_a_pair_or_a_problem(write: Any, tmp_path: Path) -> None:
    for shard in (0, 1):
        write(tmp_path, shard)
    source = require_random_access(open_source(str(tmp_path)), "--source")
    good, problems = [], []
    for row in range(len(source)):
        try:
            good.append(source[row].captions)
        except PairError as error:
            problems.append(error.problem)
    assert len(source) == 2 * len(ROWS)
    assert good == [("one",), ("five",)] * 2
    kinds = sorted(problem.kind for problem in problems)
    assert kinds == ["missing image"] * 4 + ["no caption"] * 2
    assert sum(NO_IMAGE in problem.message for problem in problems) == 2


def test_a_shard_alone_has_its_failures_too(tmp_path: Path) -> None:
    for folder, write, place in (("tars", write_webdataset, "00000.tar"), ("files", write_files, "00000")):
        write(tmp_path / folder, 0)
        assert len(require_random_access(open_source(str(tmp_path / folder / place)), "--source")) == len(ROWS)


def test_tfrecords_and_tables_alone_say_what_to_give(tmp_path: Path) -> None:
    write_table(tmp_path, 0)
    with pytest.raises(UserError, match=r"00000\.parquet: is img2dataset's table of results, without the images"):
        open_source(str(tmp_path / "00000.parquet"))
    (tmp_path / "00000.tfrecord").write_bytes(b"x")
    for place in (tmp_path, tmp_path / "00000.tfrecord"):
        with pytest.raises(UserError, match=r"\.tfrecord files cannot be read; .*`--output_format webdataset`"):
            open_source(str(place))


def test_other_tables_have_no_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet.write_table(arrow.table({"key": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"words")
    write_tar(tmp_path / "a.tar", members(0))
    assert len(require_random_access(open_source(str(tmp_path)), "--source")) == 3
    assert f"Not read in {tmp_path}: a.parquet.\n" in capsys.readouterr().out
    assert [failed_rows(tmp_path / name) for name in ("a.parquet", "b.parquet", "none.parquet")] == [None] * 3
