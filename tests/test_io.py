"""Files and folders are whole or not there; a config goes through YAML and comes back the same."""

import ast
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import uvit.io
from tests.checkpoint.test_saver import files_at_most
from uvit.cli.parse import parse
from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.io import (
    back_up,
    format_bytes,
    read_json,
    to_yaml,
    write_atomically,
    write_bytes,
    write_folder_atomically,
    write_json,
    write_json_once,
)


def test_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(feature_path="données/特征", output_dir="x", fp16=True, snr_gamma=5.0, adam_epsilon=1e-12)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again, _ = parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")], prog="uvit train")
    assert again == config


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a.txt"
    write_bytes(path, b"old", sync)
    with pytest.raises(RuntimeError), write_atomically(path, sync) as aside:
        aside.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new", sync)
    assert path.read_bytes() == b"new" and [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_who_may_read_a_file_is_as_the_umask_says(tmp_path: Path) -> None:
    """safetensors, by itself, lets nobody else read it."""
    with write_atomically(tmp_path / "a.safetensors") as aside:
        save_file({"a": torch.zeros(1)}, aside)
    with write_folder_atomically(tmp_path / "folder") as aside:
        (aside / "inner").mkdir()
        save_file({"a": torch.zeros(1)}, aside / "inner" / "b.safetensors")
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    found = [tmp_path / "a.safetensors", tmp_path / "folder" / "inner" / "b.safetensors"]
    assert [path.stat().st_mode for path in found] == [usual, usual]
    with write_folder_atomically(tmp_path / "scripts") as aside:
        (aside / "run.sh").touch(0o755)
        (aside / "link").symlink_to(tmp_path / "usual")
    assert (tmp_path / "scripts" / "run.sh").stat().st_mode & 0o777 == 0o755, "only files that no others can read"


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.writing").write_bytes(b"half")
    (tmp_path / ".folder.writing").mkdir()
    (tmp_path / ".folder.writing" / "stray").touch()
    write_bytes(tmp_path / "a.txt", b"whole")
    with write_folder_atomically(tmp_path / "folder") as aside:
        (aside / "inside").mkdir()
        (aside / "inside" / "file").write_bytes(b"whole")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a.txt", "folder", "folder/inside", "folder/inside/file",
    ]  # fmt: skip


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_folder_atomically(tmp_path / "in" / "folder") as aside:
        (aside / "file").touch()
        raise RuntimeError
    assert list((tmp_path / "in").iterdir()) == []


def test_a_disk_that_takes_no_more_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with files_at_most(100), pytest.raises(OSError, match="too large"):
        write_json(path, list(range(1000)))
    assert read_json(path) == {"a": 1} and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_first_of_several_writers_wins(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_json_once(tmp_path / "a.json", {"writer": i}), range(32)))
    first = read_json(tmp_path / "a.json")
    write_json_once(tmp_path / "a.json", {"writer": "late"})
    assert read_json(tmp_path / "a.json") == first and first["writer"] in range(32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_back_ups_take_the_first_free_name(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "a.json").touch()
        assert back_up(tmp_path / "run") == tmp_path / f"run.old{number}"
        assert back_up(tmp_path / "a.json") == tmp_path / f"a.old{number}.json"


def test_the_current_folder_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path(), tmp_path):
        with pytest.raises(UserError, match=r"is the current folder, .*start from another"):
            back_up(path)


def test_bytes_in_words() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2**50)] == [
        "0 bytes", "1,023 bytes", "1.0 KiB", "1.5 GiB", "1,024.0 TiB",
    ]  # fmt: skip


def test_only_io_renames_and_syncs() -> None:
    """Elsewhere only what has a protocol of its own does: checkpoints and shards, which several processes write."""
    package = Path(uvit.io.__file__).parent
    own = {"io.py", "checkpoint/folder.py", "store/shard.py"}
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # A path's take one argument; a string's replace takes two, and a dataclass's has keywords.
                moves = node.func.attr in ("rename", "replace") and len(node.args) == 1 and not node.keywords
                if moves or node.func.attr in ("fsync", "link", "symlink"):
                    found.add(path.relative_to(package).as_posix())
    assert found == own


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_bytes(pipe, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
