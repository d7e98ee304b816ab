"""Whatever a folder of features holds is found, and what is none is said to be none."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import info, write_store
from uvit.config.store import FeaturesInfoConfig, FeaturesVerifyConfig
from uvit.errors import UserError
from uvit.store.info import info as show_info
from uvit.store.reader import open_features
from uvit.store.splits import find_splits, find_stores
from uvit.store.verify import verify
from uvit.store.writer import StoreWriter


def test_all_kinds_are_found_side_by_side(root: Path, old: Path) -> None:
    StoreWriter(root / "begun", info(split="begun"))
    (old / "train").rename(root / "old")
    (root / "notes").mkdir()
    found = [(split.name, split.kind) for split in find_splits(str(root))]
    assert found == [("begun", "unfinished"), ("old", "npy"), ("train", "store")]
    assert [split.name for split, _ in find_stores(str(root), "train")] == ["train"]
    with pytest.raises(UserError, match="begun: is not finished"):
        find_stores(str(root))
    with pytest.raises(UserError, match=r"old: contains \.npy features"):
        find_stores(str(root), "old")


def test_the_official_codes_preview_prompts_are_no_split(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_preview_prompts(old)
    assert [split.name for split in find_splits(str(old))] == ["train", "val"]
    show_info(FeaturesInfoConfig(str(old)))
    assert verify(FeaturesVerifyConfig(str(old))) == 0
    assert "run_vis" not in capsys.readouterr().out
    with pytest.raises(UserError, match="has no split test, only train, val;"):
        open_features(old, "test")


def add_preview_prompts(features: Path) -> None:
    """As the official U-ViT code pickles them: a prompt and its text embedding in each file."""
    (features / "run_vis").mkdir()
    pair = np.empty(2, dtype=object)
    pair[:] = ["a green train", np.zeros((16, 32), np.float32)]
    np.save(features / "run_vis" / "0.npy", pair, allow_pickle=True)


def test_a_split_by_its_own_folder_has_the_name_it_was_made_with(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "moved", info(split="val"))
    assert [split.name for split in find_splits(str(folder))] == ["val"]


def test_a_store_of_version_1_is_the_split_train(root: Path) -> None:
    manifest = json.loads((root / "train" / "manifest.json").read_text())
    for key in ("split", "flipped"):
        del manifest[key]
    (root / "train" / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    assert [split.name for split in find_splits(str(root / "train"))] == ["train"]


def test_what_lies_in_a_store_is_not_what_lies_in_its_neighbour(root: Path) -> None:
    (root / "train" / "inner").mkdir()
    (root / "train" / "inner" / "file").touch()
    (root / "train" / ".partial-00000").mkdir()
    (root / "train" / ".partial-00000" / "lock").touch()
    names = {path.name for path in find_splits(str(root))[0].own_files()}
    assert {"lock", "manifest.json", "moments-00000.npy"} < names
    assert "file" not in names


def test_mistakes_are_named(root: Path, old: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, only, says in [
        (tmp_path / "nowhere", None, "no such folder"),
        (tmp_path / "empty", None, "contains no features"),
        (old / "train", None, f"give {old}"),
        (root, "val", "--split val: .* it has train"),
    ]:
        with pytest.raises(UserError, match=says):
            find_splits(str(path), only)
    (root / "train" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--path .*manifest\.json is not the manifest of a feature store"):
        find_splits(str(root))
