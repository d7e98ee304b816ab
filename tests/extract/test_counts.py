"""The last line of an extraction: what was found is stored or skipped, and the numbers add up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.sources.pictures import png, write_coco, write_tar
from uvit.config.extract import ExtractConfig
from uvit.extract.extract import extract
from uvit.store.reader import FeatureStore

GOOD, BROKEN = png("red", (16, 16)), png("red", (16, 16))[:40]


def write_folder(root: Path) -> tuple[str, ...]:
    folder = root / "folder"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.png").write_bytes(BROKEN if name == "b" else GOOD)
        (folder / f"{name}.txt").write_text(" " if name == "c" else name)
    (folder / "d.txt").unlink()
    (folder / "lonely.txt").write_text("no image")
    (folder / ".DS_Store").write_bytes(b"")
    return (str(folder),)


def write_tars(root: Path) -> tuple[str, ...]:
    members = [(f"{name}.png", BROKEN if name == "b" else GOOD) for name in "abcdef"]
    members += [(f"{name}.txt", b" " if name == "c" else name.encode()) for name in "abcefg"]
    return (str(write_tar(root / "a.tar", members)),)


def write_annotations(root: Path) -> tuple[str, ...]:
    images = [{"id": name, "file_name": f"{name}.png"} for name in "abcdef"]
    notes = [{"image_id": name, "caption": " " if name == "c" else name} for name in "abcefg"]
    for name in "abcdef":
        (root / f"{name}.png").write_bytes(BROKEN if name == "b" else GOOD)
    return (str(write_coco(root / "captions.json", images, notes)),)


def write_url(root: Path) -> tuple[str, ...]:
    members = [(f"{name}.png", BROKEN if name == "b" else GOOD) for name in "abcef"]
    members += [(f"{name}.txt", b" " if name == "c" else name.encode()) for name in "abcef"]
    return (write_tar(root / "a.tar", [*sorted(members), ("g.txt", b"x"), ("h.png", GOOD)]).as_uri(),)


@pytest.fixture
def flags(vae_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "store"),
        "vae_name_or_path": str(vae_folder),
        "text": "tokens",
        "resolution": 16,
        "min_image_size": 8,
        "model_max_length": 8,
        "vocab_size": 300,
        "batch_size": 2,
        "shard_size": 2,
        "num_workers": 0,
        "device": "cpu",
        "disable_tqdm": True,
    }


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("write", [write_folder, write_tars, write_annotations, write_url])
def test_the_last_line_adds_up(
    write: Any, flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags |= {"source": write(tmp_path)}
    if write is write_annotations:
        flags |= {"image_folder": (str(tmp_path),)}
    extract(ExtractConfig(**flags))
    line = last_line(capsys)
    assert line.startswith("7 pairs found: 3 stored, 4 skipped (1 broken image, 1 missing image, 2 no caption). See ")
    store = FeatureStore(tmp_path / "store" / "train")
    problems = [json.loads(each) for each in (store.folder / "problems.jsonl").read_text().splitlines()]
    assert store.num_samples == 3 and len(problems) == 4
    extract(ExtractConfig(**flags))
    assert last_line(capsys) == line, "a finished store says the same"


def test_shards_and_splits_add_up(flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags |= {"source": write_folder(tmp_path)}
    for part in (1, 3, 0):
        extract(ExtractConfig(**flags, shard=f"{part}/4"))
        assert "pairs found" not in capsys.readouterr().out
    extract(ExtractConfig(**flags, shard="2/4"))
    assert last_line(capsys).startswith("7 pairs found: 3 stored, 4 skipped")
    found = 0
    for split in ("train", "val"):
        extract(ExtractConfig(**flags | {"output_dir": str(tmp_path / "split"), "val_every": 3, "split": split}))
        numbers = re.match(r"(\d+) pairs found: (\d+) stored, (\d+) skipped", last_line(capsys))
        assert numbers is not None
        assert int(numbers[1]) == int(numbers[2]) + int(numbers[3])
        found += int(numbers[1])
        flags |= {"vocab_size": None}
    assert found == 7


def test_nothing_skipped(flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"file_name": "a.png", "captions": ["one", " ", "two"]}
    (tmp_path / "a.png").write_bytes(GOOD)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    extract(ExtractConfig(**flags, source=(str(tmp_path),)))
    assert last_line(capsys).startswith("1 pair found: 1 stored, 0 skipped; also 1 empty caption. See ")
