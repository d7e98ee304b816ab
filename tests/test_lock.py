"""One writer at a time: who holds the lock keeps others out, and who is gone does not."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import uvit.lock
from uvit.errors import UserError
from uvit.lock import LOCK, Writer, WriterLock, current_writer, this_writer

HOLDER = """
import sys
from pathlib import Path
from uvit.lock import WriterLock
with WriterLock(Path(sys.argv[1]), "run"):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock of tmp_path/run until its stdin is closed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def write(path: Path, **fields: object) -> Writer:
    """A lock file as this process would write it, with some other fields."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        own = replace(this_writer(file.fileno(), path), host="elsewhere", since="2026-01-02 03:04:05")
        writer = replace(own, **fields)  # type: ignore[arg-type]
        json.dump(asdict(writer), file)
    return writer


def takes(path: Path) -> bool:
    with WriterLock(path, "run") as lock:
        return path.read_bytes() == lock.content


# Who is there


def test_a_second_process_is_refused_by_name(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "link", tmp_path / "run" / ".." / "run"):
        with pytest.raises(UserError, match=rf"^run: is in use by process {holder.pid} on \S+, since \d{{4}}-.* UTC;"):
            takes(folder / LOCK)
    holder.communicate("")
    assert not (tmp_path / "run").exists()  # nothing was written into it
    assert takes(tmp_path / "run" / LOCK)


def test_a_killed_process_holds_nothing(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.kill()
    while current_writer(tmp_path / "run" / LOCK):
        pass  # it is not waited for: a process that has ended and whose parent does not know yet holds nothing either
    assert takes(tmp_path / "run" / LOCK)
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_stopped_process_still_holds(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="is in use"):
        takes(tmp_path / "run" / LOCK)


def test_the_copy_of_a_folder_in_use_is_free(tmp_path: Path) -> None:
    with WriterLock(tmp_path / "run" / LOCK, "run"):
        (tmp_path / "run" / "file").touch()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert takes(tmp_path / "copy" / LOCK)
        assert current_writer(tmp_path / "run" / LOCK)
    assert not current_writer(tmp_path / "run" / LOCK)


def test_a_process_holds_its_own_lock_once(tmp_path: Path) -> None:
    with WriterLock(tmp_path / LOCK, "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        takes(tmp_path / LOCK)
    assert takes(tmp_path / LOCK)


@pytest.mark.parametrize("fields", [{"started": "1"}, {"pid": 2**22 + 1}], ids=["pid used again", "no such pid"])
def test_a_process_that_is_gone_holds_nothing(fields: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path / LOCK, **fields)
    assert takes(tmp_path / LOCK)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"pid": 1}', b"null"])
def test_a_lock_without_a_name_holds_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert takes(tmp_path / LOCK)


def test_it_goes_however_the_block_ends(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, ZeroDivisionError, SystemExit):
        with pytest.raises(error), WriterLock(tmp_path / "run" / LOCK, "run"):
            raise error
        assert not (tmp_path / "run").exists()
    with WriterLock(tmp_path / "run" / LOCK, "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def contend(path: Path, start: "threading.Barrier", results: "multiprocessing.Queue[bool]") -> None:
    start.wait()
    try:
        with WriterLock(path, "run"):
            start.wait()  # until all have tried
            results.put(True)
    except UserError:
        start.wait()
        results.put(False)


def test_one_of_many_takes_what_a_dead_one_left(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(5):
        write(tmp_path / LOCK, started="1")
        start, results = context.Barrier(6), context.Queue()
        processes = [context.Process(target=contend, args=(tmp_path / LOCK, start, results)) for _ in range(6)]
        for process in processes:
            process.start()
        assert sorted(results.get(timeout=60) for _ in processes) == [False] * 5 + [True], number
        for process in processes:
            process.join()
        assert not (tmp_path / LOCK).exists()


# Other machines


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvit.lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(uvit.lock, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(uvit.lock, "POLL_SECONDS", 0.05)


@pytest.mark.usefixtures("hasty")
def test_a_silent_lock_of_another_machine_is_taken_after_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / LOCK, machine="another")
    os.utime(tmp_path / LOCK, (4e9, 4e9))  # its clock is years ahead
    assert takes(tmp_path / LOCK)
    assert f"run: was in use by process {os.getpid()} on elsewhere, since 2026-01-02" in capsys.readouterr().out


def test_a_lock_of_another_machine_that_is_touched_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is years behind, and it touches the file between two looks."""
    monkeypatch.setattr(uvit.lock, "STALE_SECONDS", 1e9)
    clock = iter(range(1, 100))
    path = tmp_path / LOCK
    monkeypatch.setattr(uvit.lock.time, "sleep", lambda _: os.utime(path, (1000 * next(clock),) * 2))
    writer = write(path, machine="another")
    with pytest.raises(UserError, match=r"is in use by process .* on elsewhere"):
        takes(path)
    assert current_writer(path) == writer


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("way", ["removed", "taken"])
def test_who_has_lost_the_lock_is_told_and_leaves_the_file_alone(way: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with WriterLock(path, "run") as lock:
        lock.check()
        if way == "taken":
            write(path)
        else:
            path.unlink()
        lock._thread.join(60)
        with pytest.raises(UserError, match=r"run: is no longer this process's .*run the same command again"):
            lock.check()
    assert path.exists() == (way == "taken")


@pytest.mark.usefixtures("hasty")
def test_the_file_is_touched_while_it_is_held(tmp_path: Path) -> None:
    with WriterLock(tmp_path / LOCK, "run") as lock:
        os.utime(tmp_path / LOCK, (1, 1))
        while (tmp_path / LOCK).stat().st_mtime == 1:
            lock.check()
