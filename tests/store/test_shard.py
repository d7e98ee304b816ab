"""A shard outlives whatever stops it: at the worst, what came after the last commit is done again."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import info, write_store
from tests.store.test_writer import LEFT_OUT, contents, finish, write_rows
from uvit.errors import UserError
from uvit.store import shard
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreWriter


def test_what_was_appended_after_the_last_commit_is_written_again(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", info())
    write_rows(writer, 0, 3)
    for path in (tmp_path / "store" / ".partial-00000").iterdir():
        if path.suffix in (".npy", ".jsonl"):
            with path.open("ab") as file:
                file.write(b"what a kill may leave")
    write_all(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(write_store(tmp_path / "whole", info(), LEFT_OUT))


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: (partial / "progress.json").unlink(),
        lambda partial: (partial / "progress.json").write_text('{"next_row": 2'),
        lambda partial: (partial / "progress.json").write_text("[]"),
        lambda partial: (partial / "progress.json").write_text('{"next_row": 99, "bytes": {}}'),
        lambda partial: (partial / "moments-00000.npy").unlink(),
        lambda partial: os.truncate(partial / "moments-00000.npy", 10),
    ],
)
def test_a_shard_whose_journal_does_not_fit_is_begun_afresh(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    writer = StoreWriter(tmp_path / "store", info())
    write_rows(writer, 0, 3)
    assert writer.next_row(0) == 3
    damage(tmp_path / "store" / ".partial-00000")
    assert writer.next_row(0) == 0
    write_all(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(write_store(tmp_path / "whole", info(), LEFT_OUT))


def killed_at(folder: Path, calls: int) -> bool:
    """Write a store in a process that is killed at its so-manieth call that changes the disk; whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = calls

    def counted(call: Callable) -> Callable:
        def calls(*arguments: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*arguments, **options)

        return calls

    for owner, name in (
        *((Path, name) for name in ("mkdir", "open", "replace", "unlink")),
        *((os, name) for name in ("fsync", "link", "unlink", "rmdir")),
        (shard, "_write_all"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    try:
        write_all(folder)
    except BaseException:
        os._exit(1)
    os._exit(0)


def write_all(folder: Path) -> None:
    writer = StoreWriter(folder, info())
    for number in range(3):
        if not writer.done(number):
            write_rows(writer, number, writer.rows(number).stop)
    finish(writer)


@pytest.mark.slow
def test_killed_at_any_call_that_changes_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once at every second call and then run to the end; and one store over and over, each time a little later."""
    whole = contents(write_store(tmp_path / "whole", info(), LEFT_OUT))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what was written outlives a process without it
    calls = 0
    while killed_at(tmp_path / str(calls), calls):
        write_all(tmp_path / str(calls))
        assert contents(tmp_path / str(calls)) == whole, calls
        calls += 2
    assert calls > 100, "the calls are not those that are used"
    again = 7
    while killed_at(tmp_path / "again", again):
        again += 1
    assert contents(tmp_path / "again") == whole


@pytest.mark.parametrize("killed_after", range(6))
def test_killed_amid_the_renames(tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four arrays, the captions and the record: whatever was moved, opening the shard again moves the rest."""

    class KilledError(Exception):
        pass

    writer, moved = StoreWriter(tmp_path / "store", info()), 0

    def replace(path: Path, target: Path) -> None:
        nonlocal moved
        if target.parent == writer.folder:
            if moved == killed_after:
                raise KilledError
            moved += 1
        path.rename(target)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Path, "replace", replace)
        write_rows(writer, 0, 4)
    write_all(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(write_store(tmp_path / "whole", info(), LEFT_OUT))


def test_a_shard_takes_one_process_at_a_time(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, info())
    busy = pytest.raises(UserError, match=r"another process is writing shard 1; .*--shard 0/2")
    with writer.open_shard(1), writer.open_shard(2), busy, writer.open_shard(1):
        pass
    write_rows(writer, 1, 8)
    with pytest.raises(UserError, match="another process is writing shard 1"), writer.open_shard(1):
        pass
    assert not (tmp_path / ".partial-00001").exists()


def test_features_of_another_shape_are_a_bug_not_a_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, info())
    part = EncodedPairs(["a"], [("a",)], np.zeros((1, 8, 4, 4)), None, np.zeros((1, 3, 5)), np.zeros((1, 3)))
    with pytest.raises(AssertionError), writer.open_shard(0) as opened:
        opened.append(part, next_row=1)
    assert writer.next_row(0) == 0
