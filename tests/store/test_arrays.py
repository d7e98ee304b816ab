"""Items come from the files that hold them, whatever is in memory and however few files may be open."""

import functools
import gc
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from uvit.store.arrays import (
    Header,
    OpenFile,
    OpenFiles,
    ReadRequest,
    ShardedArray,
    as_bytes,
    read_all,
    read_header,
)

LENGTHS = [0, 3, 0, 0, 2, 4, 0]


@pytest.fixture
def parts(tmp_path: Path) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    parts = [random.standard_normal((length, 5, 1000)).astype(np.float16) for length in LENGTHS]
    for i, part in enumerate(parts):
        np.save(tmp_path / f"{i}.npy", part)
    return parts


def sharded(folder: Path) -> tuple[OpenFiles, ShardedArray]:
    files, names = OpenFiles(folder), [f"{i}.npy" for i in range(len(LENGTHS))]
    offsets = [read_header(files, name).offset for name in names]
    return files, ShardedArray(names, LENGTHS, offsets, (5, 1000), np.dtype(np.float16))


@pytest.mark.parametrize("cold", [False, True])
def test_items_of_arrays_in_many_files(tmp_path: Path, parts: list[np.ndarray], cold: bool) -> None:
    files, array = sharded(tmp_path)
    if cold:
        if not hasattr(os, "posix_fadvise"):
            pytest.skip("this system cannot be told to forget a file")
        for name in array.names:
            descriptor = files.open(name).descriptor
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    items = np.array([8, 0, 0, 4, 3, 2, 7])
    out = array.empty(len(items))
    read_all(files, array.requests(items, out))
    np.testing.assert_array_equal(out, np.concatenate(parts)[items])
    assert [array.find(int(item)) for item in items] == [(5, 3), (1, 0), (1, 0), (4, 1), (4, 0), (1, 2), (5, 2)]


def test_few_files_stay_open_and_none_after_the_last_use(tmp_path: Path, parts: list[np.ndarray]) -> None:
    _, array = sharded(tmp_path)
    gc.collect()
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard))
    files = OpenFiles(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for item in [0, 8, 3, 1, 4, 6]:
        read_all(files, array.requests(np.array([item]), array.empty(1)))
        assert len(os.listdir("/dev/fd")) <= before + 2  # noqa: PTH208
    del files
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_a_file_that_has_become_shorter(tmp_path: Path, parts: list[np.ndarray]) -> None:
    files, array = sharded(tmp_path)
    os.truncate(tmp_path / "5.npy", (tmp_path / "5.npy").stat().st_size - 1)
    out = array.empty(1)
    read_all(files, array.requests(np.array([7]), out))
    assert (out == parts[5][2]).all()
    with pytest.raises(EOFError, match=r"5\.npy is shorter than when it was opened"):
        read_all(files, array.requests(np.array([8]), out))


def test_a_file_that_is_gone_and_a_folder(tmp_path: Path) -> None:
    out = np.empty(3)
    with pytest.raises(FileNotFoundError, match=r"gone\.npy"):
        read_all(OpenFiles(tmp_path), [ReadRequest("gone.npy", 0, as_bytes(out))])
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(IsADirectoryError):
        read_all(OpenFiles(tmp_path), [ReadRequest("folder.npy", 0, as_bytes(out))])


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_headers(tmp_path: Path, version: tuple[int, int]) -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3))
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    assert read_header(OpenFiles(tmp_path), "x.npy") == Header((2, 3), np.dtype(np.int32), True, 128)


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x08\x00{'a': ((", b"\x93NUMPY\x07\x00\x01\x00\x00\x00\n"]
)
def test_what_is_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError):
        read_header(OpenFiles(tmp_path), "x.npy")


def test_threads_that_read_many_files_with_few_of_them_open(tmp_path: Path) -> None:
    """A file that one thread pushes out of the list of open ones is still whole for the thread that reads it."""
    for i in range(40):
        np.save(tmp_path / f"{i}.npy", np.full((50, 64), i, np.int32))
    files = OpenFiles(tmp_path)
    files.open = functools.lru_cache(2)(lambda name: OpenFile(f"{tmp_path}/{name}"))
    array = ShardedArray([f"{i}.npy" for i in range(40)], [50] * 40, [128] * 40, (64,), np.dtype(np.int32))

    def read(seed: int) -> bool:
        items = np.random.default_rng(seed).integers(0, 2000, 200)
        out = array.empty(200)
        read_all(files, array.requests(items, out))
        return bool((out == (items // 50)[:, None]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))
