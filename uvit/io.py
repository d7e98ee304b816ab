"""Files and folders that are whole or not there, JSON and YAML, and sizes in words.

The only place that writes aside, syncs and renames: a kill or a power cut leaves the old content or the new one, never
half of it. What it leaves beside them is named `.NAME.writing`, and goes away with the next writing of the same name.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Whole or not there


@contextlib.contextmanager
def write_atomically(path: Path, sync: bool = True) -> Iterator[Path]:
    """A path to write the new content of `path` to; it takes the name when the block ends without an error.

    One process at a time may write a path. Without `sync` a kill loses nothing, but a power cut may: for files that are
    many and cheap to make again. Raises OSError where the disk does not take it.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        yield aside
        if sync:
            sync_path(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """The same of a folder, made empty and with its parents; `folder` must not be there when the block ends."""
    aside = folder.with_name(f".{folder.name}.writing")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync_path(path)
        aside.rename(folder)
        sync_path(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    with write_atomically(path, sync) as aside:
        aside.write_bytes(data)


def sync_path(path: Path) -> None:
    """Make sure that a file, or the names in a folder, outlive a power cut.

    A file's errors are raised: they may be the only sign of a disk that did not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)  # some file systems cannot sync a folder
    finally:
        os.close(descriptor)


def back_up(path: Path) -> Path:
    """Rename a file or folder to the first free one of NAME.old1, NAME.old2, ...; returns the new path."""
    names = (path.with_name(f"{path.stem}.old{i}{path.suffix}") for i in range(1, 10000))
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    return kept


# JSON and YAML


def read_json(path: Path) -> Any:
    """Raises OSError where it cannot be read, ValueError where it is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())


def write_json_once(path: Path, content: Any, indent: int = 2) -> None:
    """The same, unless another process was first: then the file stays as that one wrote it."""
    if path.exists():
        return
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_json(own, content, indent)
    try:
        os.link(own, path)
    except (FileExistsError, FileNotFoundError):  # the latter: tidied away by a process that has just finished
        pass
    except OSError:  # a file system without links
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def to_yaml(config: Any) -> str:
    """A config dataclass, as a file that `--config` reads back to the same config."""
    import yaml

    content = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def write_yaml(config: Any, path: Path) -> None:
    """Whole or not at all."""
    write_bytes(path, to_yaml(config).encode())


# Sizes in words


def format_bytes(num_bytes: float) -> str:
    """In the unit that suits it, such as 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
