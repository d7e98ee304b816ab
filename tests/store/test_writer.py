"""A store is written whole or gone on with, and never into a folder that is something else."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import NUM_PAIRS, SHARD_SIZE, encoded, info, write_store
from uvit.errors import UserError
from uvit.sources.types import Problem
from uvit.store.reader import open_features
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreInfo, StoreWriter

LEFT_OUT = (2, 4, 5, 6, 7)  # a pair of shard 0, and all of shard 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_rows(writer: StoreWriter, shard: int, stop: int, commit: bool = True) -> None:
    """Go on with a shard up to a row, as a process that is then stopped."""
    with writer.open_shard(shard) as opened:
        for row in range(opened.next_row, stop):
            (part,) = encoded(range(row, row + 1), writer.info, LEFT_OUT)
            opened.append(part, next_row=row + 1)
            if commit:
                opened.commit()
        if stop == writer.rows(shard).stop:
            opened.finish()


def finish(writer: StoreWriter) -> None:
    writer.finish(np.full((3, 5), -1, np.float16), np.full(3, 65535, np.uint16))


@pytest.mark.parametrize("what", [info(), info(flipped=True), info(context_shape=None)])
@pytest.mark.parametrize("stop_at", range(NUM_PAIRS))
def test_stopped_anywhere_and_gone_on_with_it_is_the_same_to_the_byte(
    tmp_path: Path, stop_at: int, what: StoreInfo
) -> None:
    writer, last = StoreWriter(tmp_path / "stopped", what), stop_at // SHARD_SIZE
    for shard in range(last):
        write_rows(writer, shard, writer.rows(shard).stop)
    write_rows(writer, last, stop_at, commit=False)
    with pytest.raises(UserError, match="not finished"):
        open_features(tmp_path, "stopped")

    writer = StoreWriter(tmp_path / "stopped", what)
    assert [writer.done(shard) for shard in range(3)] == [shard < last for shard in range(3)]
    assert writer.next_row(last) == stop_at
    for shard in range(last, 3):
        write_rows(writer, shard, writer.rows(shard).stop)
    empty = np.full((3, 5), -1, np.float16) if what.context_shape else None
    writer.finish(empty, np.full(3, 65535, np.uint16))
    assert writer.complete
    assert contents(tmp_path / "stopped") == contents(write_store(tmp_path / "whole", what, LEFT_OUT))


def test_several_may_begin_and_finish_at_once(tmp_path: Path) -> None:
    """Threads stand for processes: locks are held by open files."""
    errors: list[BaseException] = []

    def join_in(part: int) -> None:
        try:
            writer = StoreWriter(tmp_path / "store", info())
            if part < 3:
                write_rows(writer, part, writer.rows(part).stop)
            finished.wait()
            finish(writer)
        except BaseException as error:
            errors.append(error)

    finished = threading.Barrier(6, timeout=60)
    threads = [threading.Thread(target=join_in, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert contents(tmp_path / "store") == contents(write_store(tmp_path / "whole", info(), LEFT_OUT))


def test_the_manifest_counts_what_was_left_out(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, info())
    for shard in range(3):
        write_rows(writer, shard, writer.rows(shard).stop)
    finish(writer)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["version"], manifest["split"]) == (2, "train")
    assert (manifest["num_source_pairs"], manifest["num_pairs"], manifest["num_left_out"]) == (11, 6, 5)
    assert manifest["problems"] == {"broken image": 5}
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 0, 3]
    problems = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [problem["id"] for problem in problems] == [f"pair-{i}" for i in LEFT_OUT]
    assert np.load(tmp_path / "moments-00001.npy").shape == (0, 8, 2, 2)


def test_nothing_left_is_no_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, info(num_source_pairs=1))
    with writer.open_shard(0) as shard:
        (part,) = encoded(range(1), info(), left_out=[0])
        shard.append(part, next_row=1)
        shard.finish()
    with pytest.raises(UserError, match=r"all 1 pairs were skipped; .*problems\.jsonl says"):
        finish(writer)
    assert not writer.complete


def test_captions_may_be_counted_without_their_text(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "train", info(num_source_pairs=1, context_shape=None))
    token_ids = np.arange(6).reshape(2, 3)
    problem = Problem("a", "empty caption", "one of its captions is empty", left_out=False)
    with writer.open_shard(0) as shard:
        part = EncodedPairs(["a"], [()], np.zeros((1, 8, 2, 2)), None, None, token_ids, (problem,), counts=[2])
        shard.append(part, next_row=1)
        shard.finish()
    writer.finish(None, np.zeros(3, np.uint16))
    features = open_features(tmp_path)
    assert features.captions(0) == ()
    last = features.read(np.array([0]), np.array([0.9]))
    assert last.token_ids is not None
    assert last.token_ids.tolist() == [[3, 4, 5]]
    assert json.loads((tmp_path / "train" / "manifest.json").read_text())["num_left_out"] == 0


def test_a_stream_ends_where_it_is_found_to_end(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "stream", info(num_source_pairs=None))
    assert (writer.num_shards, writer.rows(2)) == (None, range(8, 12))
    for shard in range(2):
        write_rows(writer, shard, writer.rows(shard).stop)
    with writer.open_shard(2) as shard:
        for row, part in zip(range(8, 11), encoded(range(8, 11), info()), strict=True):
            shard.append(part, next_row=row + 1)
        writer.end_stream(11)
        shard.finish()
    assert (writer.num_shards, writer.rows(2)) == (3, range(8, 11))
    writer.end_stream(11)
    with pytest.raises(UserError, match="had 11 pairs before and now has 12"):
        StoreWriter(tmp_path / "stream", info(num_source_pairs=None)).end_stream(12)
    finish(writer)
    whole = contents(write_store(tmp_path / "whole", info(), LEFT_OUT))
    assert contents(tmp_path / "stream")["moments-00002.npy"] == whole["moments-00002.npy"]


# What is refused


def test_other_settings_are_refused(tmp_path: Path) -> None:
    StoreWriter(tmp_path, info())
    with pytest.raises(UserError, match=r"latent_scale: was 0\.5, now 0\.25"):
        StoreWriter(tmp_path, info(latent_scale=0.25))
    with pytest.raises(UserError, match=r"source\.resolution: was 16, now 24"):
        StoreWriter(tmp_path, info(source={"source": "made up", "resolution": 24}))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        StoreWriter(tmp_path, info())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["manifest.json", "settings.json", "empty_context.npy", "train/0.npy"])
def test_a_folder_of_an_earlier_version_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("there")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"store of version 1|\.npy features"):
        StoreWriter(tmp_path / "train", info())
    assert contents(tmp_path) == before
