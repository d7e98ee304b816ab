"""One writer at a time: a lock file that names the process which writes a folder.

The lock file is in the folder (or beside it), so it is the same file under every spelling of the path and on every
machine that shares the disk. It is removed when the writer ends. What a killed writer leaves behind does not count:

- A writer on this machine is known by its pid and start time. If that process is gone, the lock is free at once.
- Of a writer on another machine, or in another container, only the file is known. The writer touches it every
  `HEARTBEAT_SECONDS`. Whoever wants the lock watches the file for `STALE_SECONDS`, and takes it if it does not change.
  No clocks are compared.

`flock` protects only the moment in which the file is read and written. It is not held longer: forked processes would
inherit it, and not every network file system keeps it. If two machines do write at once, the loser finds another
writer's name in the file, and `WriterLock.check` raises.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from uvit.errors import UserError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0  # between two looks at the lock of another machine
MAX_BYTES = 2**16  # of a lock file; a path has at most 4096
LOCK = ".lock"  # its name in a folder


@dataclass(frozen=True)
class Writer:
    """What a lock file says."""

    host: str
    pid: int
    machine: str  # boot id and namespace of pids: where the pid means something
    started: str  # of the process, in clock ticks since the boot: another process may get the same pid later
    since: str  # UTC
    path: str  # of the lock file, and its inode: a copy of a folder that is in use has a lock file of neither
    inode: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} UTC"


class WriterLock:
    """A lock file that this process holds while the `with` block runs.

    Args:
        path: the lock file. Its folder is made, and removed again at the end if nothing was written into it.
        what: the flag and folder, for messages.

    Entering raises UserError if another process holds the lock, OSError if the file cannot be written.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.content = b""
        self.lost = False
        self._made_folder = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock {path}", daemon=True)

    def __enter__(self) -> "WriterLock":
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError), open_locked(self.path, create=False) as file:
            if os.pread(file, MAX_BYTES, 0) == self.content:
                self.path.unlink()
        if self._made_folder:
            with contextlib.suppress(OSError):  # not empty
                self.path.parent.rmdir()

    def check(self) -> None:
        """Raises UserError if the lock file is gone or names another writer."""
        if self.lost:
            raise UserError(
                f"{self.what}: is no longer this process's ({self.path} was removed, moved or taken by another "
                "process), so this process stops before two write into it; run the same command again to resume"
            )

    def _take(self) -> None:
        seen, since = None, 0.0
        while True:
            with open_locked(self.path, create=True) as file:
                content, touched = os.pread(file, MAX_BYTES, 0), os.fstat(file).st_mtime_ns
                writer = holder(content, file, self.path)
                unchanged = seen == (content, touched)
                stale = unchanged and time.monotonic() - since >= STALE_SECONDS
                if writer is None or stale:
                    self.content = json.dumps(asdict(this_writer(file, self.path))).encode()
                    os.ftruncate(file, 0)
                    os.pwrite(file, self.content, 0)
                    return
            if writer.machine == this_machine() or (seen and not unchanged):
                raise UserError(f"{self.what}: is in use by {writer}; wait for it, stop it, or choose another folder")
            if seen is None:
                print(
                    f"{self.what}: was in use by {writer}; waiting {STALE_SECONDS:.0f} s to see whether it still is",
                    flush=True,
                )
                seen, since = (content, touched), time.monotonic()
            time.sleep(POLL_SECONDS)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                with self.path.open("rb") as file:
                    self.lost = file.read(MAX_BYTES) != self.content
                    if not self.lost:
                        os.utime(file.fileno())
            except FileNotFoundError:
                self.lost = True
            except OSError:  # a network disk that does not answer now
                continue
            if self.lost:
                return


@contextlib.contextmanager
def open_locked(path: Path, create: bool) -> Iterator[int]:
    """The descriptor of a file that nobody else reads or writes in this moment, as far as the disk keeps `flock`."""
    while True:
        file = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # a disk without flock
                fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(file, path):  # its holder has removed it in the meantime
                continue
            yield file
            return
        finally:
            os.close(file)


def is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


# Who holds it


def current_writer(path: Path) -> Writer | None:
    """Who holds a lock file, as far as this machine can tell; None: nobody."""
    try:
        with path.open("rb") as file:
            return holder(file.read(MAX_BYTES), file.fileno(), path)
    except OSError:
        return None


def holder(content: bytes, file: int, path: Path) -> Writer | None:
    try:
        writer = Writer(**json.loads(content))
    except (ValueError, TypeError):  # it was killed before it had written its name
        return None
    is_copy = writer.inode != os.fstat(file).st_ino and writer.path != str(path.resolve())
    is_gone = writer.machine == this_machine() and (is_copy or not is_running(writer))
    return None if is_gone else writer


def this_writer(file: int, path: Path) -> Writer:
    return Writer(
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=this_machine(),
        started=start_of_process(os.getpid()) or "",
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        path=str(path.resolve()),
        inode=os.fstat(file).st_ino,
    )


# Processes


def this_machine() -> str:
    """Where pids are comparable: this boot of this machine, and within it this namespace of pids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def is_running(writer: Writer) -> bool:
    """Whether a process of this machine still runs."""
    started = start_of_process(writer.pid)
    return started is not None and (not started or started == writer.started)


def start_of_process(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since the boot; empty if unknown; None: it has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # of another user
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no /proc
        return ""
    return None if fields[0] in "ZX" else fields[19]
