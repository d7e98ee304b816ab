"""Every kind of damage is found, by the name of the file, and nothing else is said to be damaged."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import encoded, info, write_store
from uvit.config.store import FeaturesVerifyConfig
from uvit.errors import UserError
from uvit.store.verify import verify
from uvit.store.writer import StoreWriter


def found(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `verify` says is wrong; its exit status must fit."""
    status = verify(FeaturesVerifyConfig(str(root), disable_tqdm=True))
    *wrong, summary = capsys.readouterr().out.splitlines()
    assert status == bool(wrong)
    assert ("no problems found" in summary) != bool(wrong)
    return wrong


def describe_again(folder: Path, name: str) -> None:
    """Make the manifest say that a changed file is as it should be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    for files in (manifest["files"], *(shard["files"] for shard in manifest["shards"])):
        if name in files:
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_just_written_is_well(root: Path, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(root, capsys) == []
    assert found(old, capsys) == []


def test_shards_of_which_nothing_is_left_are_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "train", info(flipped=True), left_out=range(4, 8))
    assert found(tmp_path, capsys) == []


def test_the_bar_counts_every_byte(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(FeaturesVerifyConfig(str(root)))
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}-00001.npy" for kind in ("moments", "flipped", "contexts", "tokens", "counts")),
        *("captions-00001.jsonl", "problems.jsonl", "empty_context.npy", "empty_tokens.npy"),
    ],
)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "has another checksum than"),
    ],
    ids=["missing", "cut short", "a byte changed"],
)
def test_any_file_missing_cut_short_or_changed(
    root: Path, name: str, damage: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(root / "train" / name)
    (wrong,) = found(root, capsys)
    assert wrong.startswith(f"train: {name} ")
    assert says in wrong
    assert ("shard-00001.json" in wrong) == ("-0" in name)


def test_the_advice_makes_it_whole_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, what = root / "train", info(flipped=True)
    whole = (folder / "manifest.json").read_bytes()
    (folder / "contexts-00001.npy").write_bytes(b"damage")
    (wrong,) = found(root, capsys)
    assert "remove it, manifest.json and shard-00001.json" in wrong
    for name in ("contexts-00001.npy", "manifest.json", "shard-00001.json"):
        (folder / name).unlink()
    writer = StoreWriter(folder, what)
    rows = writer.rows(1)
    with writer.open_shard(1) as shard:
        for row, part in zip(rows, encoded(rows, what, left_out={2, 5}), strict=True):
            shard.append(part, next_row=row + 1)
        shard.finish()
    writer.finish(np.full((3, 5), -1, np.float16), np.full(3, 65535, np.uint16))
    assert found(root, capsys) == []
    assert (folder / "manifest.json").read_bytes() == whole


def test_a_file_of_something_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train" / "moments-00007.npy").touch()
    (root / "train" / ".partial-00001").mkdir()
    (root / "train" / ".partial-00001" / "lock").touch()
    wrong = found(root, capsys)
    assert [line.split()[1] for line in wrong] == [".partial-00001/lock", "moments-00007.npy"]
    assert "does not belong to the store" in wrong[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"id": "pair-1", "captions": ["a"', "broken line 2"),
        (b'{"id": "pair-1"}', "broken line 2"),
        (b'{"id": "pair-1", "captions": [1, 2]}', "broken line 2"),
        (b'{"id": "pair-1", "captions": ["a"]}', "1 captions in line 2, but the counts say 2"),
        (b'{"id": "pair-1", "captions": ["a", "b"]}\n{}', "broken line 3"),
        (
            b'{"id": "pair-1", "captions": ["a", "b"]}\n{"id": "x", "captions": []}',
            "4 lines, but the shard has 3 pairs",
        ),
    ],
)
def test_captions_that_checksums_call_well(
    root: Path, line: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "train" / "captions-00000.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    describe_again(root / "train", path.name)
    (wrong,) = found(root, capsys)
    assert says in wrong


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("moments-00000.npy", lambda array: array.reshape(3, 2, 8, 2), r"contains float16 (3, 2, 8, 2)"),
        ("contexts-00000.npy", lambda array: array.astype(np.float32), "contains float32"),
        ("tokens-00000.npy", lambda array: array[:-1], "contains uint16 (3, 3)"),
        ("counts-00000.npy", lambda array: array[::-1] * 2, "counts 8 captions, but manifest.json says 4"),
        (
            "moments-00000.npy",
            lambda array: _with(array, 1, np.nan),
            "1 pairs with values that are NaN or infinite (pair-1)",
        ),
        (
            "flipped-00000.npy",
            lambda array: _with(array, 2, np.inf),
            "1 pairs with values that are NaN or infinite (pair-3)",
        ),
        (
            "contexts-00000.npy",
            lambda array: _with(array, 3, -np.inf),
            "1 of 4 items with values that are NaN or infinite",
        ),
        (
            "empty_context.npy",
            lambda array: _with(array, 0, np.nan),
            "1 of 3 items with values that are NaN or infinite",
        ),
    ],
)
def test_arrays_that_checksums_call_well(
    root: Path, name: str, change: Callable[[np.ndarray], np.ndarray], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "train" / name
    np.save(path, change(np.load(path)))
    describe_again(root / "train", name)
    wrong = [line for line in found(root, capsys) if line.startswith(f"train: {name}")]
    assert len(wrong) == 1
    assert says in wrong[0]


def _with(array: np.ndarray, item: int, value: float) -> np.ndarray:
    array[item].flat[0] = value
    return array


def test_problems_that_are_not_those_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "train" / "problems.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    describe_again(root / "train", path.name)
    (wrong,) = found(root, capsys)
    assert "give different numbers of problems" in wrong


def test_a_file_that_the_manifest_forgot(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((root / "train" / "manifest.json").read_text())
    del manifest["shards"][0]["files"]["moments-00000.npy"]
    (root / "train" / "manifest.json").write_text(json.dumps(manifest))
    wrong = found(root, capsys)
    assert any("does not list moments-00000.npy" in line for line in wrong)


def test_each_split_is_looked_at_or_the_one_that_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StoreWriter(root / "val", info(split="val"))
    (wrong,) = found(root, capsys)
    assert wrong.startswith("val: is not finished")
    assert verify(FeaturesVerifyConfig(str(root), split="train", disable_tqdm=True)) == 0


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("train/3_2.npy", None, "3_1.npy is missing"),
        ("train/4.npy", None, "4.npy is missing"),
        ("train/4.npy", np.zeros((8, 4, 5), np.float32), "4.npy has float32 (8, 4, 5)"),
        ("train/2_1.npy", np.full((16, 32), np.nan, np.float32), "2_1.npy has values that are NaN or infinite"),
        ("train/1.npy", np.array([{}]), "1.npy cannot be read as an array"),
        ("train/x.npy", np.zeros(1), "x.npy does not belong to .npy features"),
        ("empty_context.npy", None, "empty_context.npy cannot be read"),
        ("empty_context.npy", np.zeros((16, 31)), "empty_context.npy has shape (16, 31)"),
    ],
)
def test_damage_in_npy_features(
    old: Path, name: str, array: np.ndarray | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (old / "val").rename(old.parent / "val")
    if array is not None:
        np.save(old / name, array)
    elif name == "train/3_2.npy":  # a hole in the numbers
        np.save(old / name, np.load(old / "train" / "3_0.npy"))
    else:
        (old / name).unlink()
    (wrong,) = found(old, capsys)
    assert says in wrong


def test_no_features_are_a_mistake_and_no_finding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no features"):
        verify(FeaturesVerifyConfig(str(tmp_path)))
