"""What is said of features is what they hold."""

import json
from pathlib import Path

import pytest

from tests.store.test_reader import NUM_CAPTIONS, NUM_PAIRS, info
from uvit.config.store import FeaturesImportConfig, FeaturesInfoConfig
from uvit.store.info import info as show
from uvit.store.npy_convert import import_npy
from uvit.store.writer import StoreWriter


def test_a_store_for_people(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(FeaturesInfoConfig(str(root)))
    text = " ".join(capsys.readouterr().out.split())
    captions = sum(NUM_CAPTIONS) - NUM_CAPTIONS[2] - NUM_CAPTIONS[5]
    for part in (
        "train (",
        "feature store, version 2, 3 shards",
        f"pairs {NUM_PAIRS - 2}",
        f"captions {captions}, {captions / (NUM_PAIRS - 2):.2f} per pair",
        "moments (8, 2, 2) float16, also of the mirrored images",
        "text embeddings (3, 5) float16",
        "token ids (3,) uint16",
        "vae a/vae sha256 1",
        "latent scale 0.5",
        "source made up",
        "problems 2 broken image; 2 pairs skipped",
    ):
        assert part in text


def test_a_store_for_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(FeaturesInfoConfig(str(root), json=True))
    (split,) = json.loads(capsys.readouterr().out)["splits"]
    assert (split["split"], split["layout"], split["num_pairs"]) == ("train", "store", NUM_PAIRS - 2)
    assert split["text_encoder"] == {"name": "a/text_encoder", "sha256": "2"}
    assert split["bytes"] == sum(path.stat().st_size for path in (root / "train").rglob("*") if path.is_file())


def test_npy_features(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(FeaturesInfoConfig(str(old), split="val"))
    text = " ".join(capsys.readouterr().out.split())
    assert ".npy features (U-ViT layout)" in text
    assert (
        "pairs 2 captions 3, 1.50 per pair moments (8, 4, 4) float32 text embeddings (16, 32) float32 on disk" in text
    )


def test_an_imported_store_has_one_layout(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_npy(FeaturesImportConfig(str(old), str(tmp_path / "store"), disable_tqdm=True))
    capsys.readouterr()
    show(FeaturesInfoConfig(str(tmp_path / "store"), split="val"))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("layout ")] == ["layout feature store, version 2, 1 shards"]
    assert "imported from .npy features (U-ViT layout)" in lines
    assert f"source {old}" in lines


def test_what_is_not_finished_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StoreWriter(tmp_path / "train", info(vae=None, token_dtype=None))
    show(FeaturesInfoConfig(str(tmp_path)))
    text = " ".join(capsys.readouterr().out.split())
    assert "0 complete; run the same command again to resume" in text
    assert f"source pairs {NUM_PAIRS}" in text
    assert "vae not recorded" in text
    assert "token ids not stored" in text
