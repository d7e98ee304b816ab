"""Atomic writes of files and folders, JSON and YAML, and sizes as text.

An atomic write goes to a hidden name, `.NAME.writing`; then it is synced and renamed. A kill or a power cut leaves the
old content or the new content, never a part. A hidden file that a kill leaves is removed by the next write of NAME.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uvit.errors import UserError
from uvit.lock import WriterLock

# Atomic writes


def _read_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# Read once, at the start: to read it is to set it for a moment, for all threads.
FILE_MODE = 0o666 & ~_read_umask()  # of a new file


@contextlib.contextmanager
def write_atomically(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a path to write the new content to. It is renamed to `path` when the block ends without an error.

    Only one process at a time may write a path. Without `sync`, a kill loses nothing, but a power cut may; use this for
    many files that are cheap to make again. Raises OSError if the disk refuses the content.
    """
    if path.exists() and not path.is_file():  # a device such as /dev/null, or a pipe: the name must stay its own
        yield path
        return
    aside = path.with_name(f".{path.name}.writing")
    try:
        yield aside
        let_others_read(aside)
        if sync:
            sync_path(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def let_others_read(path: Path) -> None:
    """Give a new file the mode that the umask says: safetensors lets no others read what it writes."""
    if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
        path.chmod(FILE_MODE)


def takes_files(folder: Path) -> bool:
    """Whether files can be made in a folder. Its permissions do not tell: root has all, also on a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """The same for a folder. Yields an empty folder; `folder` must not exist when the block ends.

    Raises UserError if another process writes it now.
    """
    folder = folder.absolute()  # `.` has no name
    aside = folder.with_name(f".{folder.name}.writing")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WriterLock(folder.with_name(f".{folder.name}.lock"), str(folder)):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            for path in [*aside.rglob("*"), aside]:
                let_others_read(path)
                sync_path(path)
            aside.rename(folder)
            sync_path(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def move_contents(source: Path, folder: Path, last: Sequence[str]) -> None:
    """Move the files of a folder into another one, each whole; those named in `last` come last, in order of name.

    So whoever finds them knows that the others are there. Files of the same names are replaced.
    """
    for path in sorted(source.iterdir(), key=lambda path: (path.name in last, path.name)):
        sync_path(path)
        path.replace(folder / path.name)
    sync_path(folder)


def move_path(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free, or copy and delete it where that is on another disk."""
    shutil.move(source, target)
    sync_path(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that will be replaced and not changed, or a copy on a disk without links."""
    try:
        os.link(source, target)
    except OSError:
        with write_atomically(target) as aside:
            shutil.copy2(source, aside)


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    with write_atomically(path, sync) as aside:
        aside.write_bytes(data)


def sync_path(path: Path) -> None:
    """Make sure that a file, or the names in a folder, survive a power cut.

    Errors of a file are raised: they may be the only sign that the disk refused it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)  # some file systems cannot sync a folder
    finally:
        os.close(descriptor)


def back_up(path: Path) -> Path:
    """Rename a file or folder to the first free name of NAME.old1, NAME.old2, ... Returns the new path.

    Raises UserError for the current folder: relative paths would lead into the renamed one.
    """
    if path.resolve() == Path.cwd():
        raise UserError(f"{path.resolve()}: is the current folder, and is to be renamed; start from another folder")
    names = (path.with_name(f"{path.stem}.old{i}{path.suffix}") for i in range(1, 10000))
    target = next(name for name in names if not name.exists())
    path.rename(target)
    return target


# JSON and YAML


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Raises OSError if the file cannot be read, ValueError if it is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write atomically."""
    write_bytes(path, (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())


def write_json_once(path: Path, content: Any, indent: int = 2) -> None:
    """The same, unless another process was first: its file is kept."""
    if path.exists():
        return
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_json(own, content, indent)
    try:
        os.link(own, path)
    except (FileExistsError, FileNotFoundError):  # not found: a process that has just finished removed it
        pass
    except OSError:  # a file system without links
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML. `--config` reads it back as the same config."""
    import yaml

    content = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def write_yaml(config: Any, path: Path) -> None:
    """Write atomically."""
    write_bytes(path, to_yaml(config).encode())


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; None if there is no such file, or it is not YAML."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


# Sizes


def format_bytes(num_bytes: float) -> str:
    """As text with a suitable unit, such as 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
