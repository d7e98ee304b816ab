"""A checkpoint is there whole or not at all, and says what it is."""

import json
from pathlib import Path

import pytest
import torch

from uvit import checkpoint
from uvit.errors import UserError

TENSORS = {"weights": {"a": torch.arange(6.0).reshape(2, 3)}, "ema": {"a": torch.ones(2)}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 7, TENSORS, {"samples": 70})
    found = checkpoint.read(folder)
    assert folder.name == "checkpoint-7" and found.step == 7 and found.record["samples"] == 70
    assert torch.equal(found.load("weights")["a"], TENSORS["weights"]["a"])
    assert not list(tmp_path.glob(".*"))


def test_the_latest_whole_one_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, TENSORS, {})
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-100" / "ema.safetensors").unlink()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 10
    assert "ema.safetensors is missing" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}'])
def test_a_record_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, TENSORS, {})
    (folder / "uvit.json").write_text(content)
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.read(folder)


def test_what_a_kill_leaves_behind_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.writing").mkdir()
    (tmp_path / ".checkpoint-3.writing" / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 3, TENSORS, {})
    checkpoint.save(tmp_path, 3, TENSORS, {"second": True})
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.record["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_damaged_file_of_the_right_size_is_named(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, TENSORS, {})
    path = folder / "weights.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"weights.safetensors: cannot be read"):
        checkpoint.read(folder).load("weights")


def test_the_limit_keeps_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, TENSORS, {})
    checkpoint.keep_latest(tmp_path, None)
    assert len(checkpoint.folders(tmp_path)) == 3
    checkpoint.keep_latest(tmp_path, 2)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_the_optimizer_comes_back(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    names = {parameter: "p"}
    folder = checkpoint.save(tmp_path, 1, {"optimizer": checkpoint.flatten_optimizer(optimizer, names)}, {})
    other = torch.optim.AdamW([parameter], fused=True)
    checkpoint.restore_optimizer(other, names, checkpoint.read(folder).load("optimizer"))
    for key, value in optimizer.state[parameter].items():
        assert torch.equal(other.state[parameter][key], value)
    assert json.loads((folder / "uvit.json").read_text())["files"].keys() == {"optimizer.safetensors"}
