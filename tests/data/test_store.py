"""A store is written whole or gone on with, and never into a folder that is something else."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.test_features import encoded, info, write_store
from uvit.data.features import open_features
from uvit.data.store import EncodedPairs, StoreWriter
from uvit.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop_at", [0, 1, 4, 6, 10])
def test_stopped_anywhere_and_gone_on_with_it_is_the_same_to_the_byte(tmp_path: Path, stop_at: int) -> None:
    class StopError(Exception):
        pass

    def until_stopped(rows: range):  # type: ignore[no-untyped-def]
        for part in encoded(rows, info()):
            if part.ids == [f"pair-{stop_at}"]:
                raise StopError
            yield part

    writer = StoreWriter(tmp_path / "stopped", info())
    with pytest.raises(StopError):
        for shard in range(writer.num_shards):
            writer.write_shard(shard, until_stopped(writer.rows(shard)))
    assert StoreWriter(tmp_path / "stopped", info()).next_shard == stop_at // info().shard_size
    with pytest.raises(UserError, match="not finished"):
        open_features(tmp_path / "stopped")

    writer = StoreWriter(tmp_path / "stopped", info())
    for shard in range(writer.next_shard, writer.num_shards):
        writer.write_shard(shard, encoded(writer.rows(shard), info()))
    writer.finish(np.full((3, 5), -1, np.float16), np.full(3, 65535, np.uint16))
    assert writer.complete
    assert contents(tmp_path / "stopped") == contents(write_store(tmp_path / "whole", info()))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    StoreWriter(tmp_path, info())
    with pytest.raises(UserError, match=r"latent_scale: 0\.5 there, 0\.25 here"):
        StoreWriter(tmp_path, info(latent_scale=0.25))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        StoreWriter(tmp_path, info())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_features_of_another_shape_are_a_bug_not_a_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, info())
    part = EncodedPairs(["a"], [("a",)], np.zeros((1, 8, 4, 4)), np.zeros((1, 3, 5)), np.zeros((1, 3)))
    with pytest.raises(AssertionError):
        writer.write_shard(0, [part])
    assert writer.next_shard == 0
