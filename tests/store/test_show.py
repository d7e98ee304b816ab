"""The sheet shows what was encoded, in the order of the rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.store.test_reader import info
from uvit.config.store import FeaturesSampleConfig
from uvit.errors import UserError
from uvit.images import to_pil
from uvit.store.reader import open_features
from uvit.store.shard import EncodedPairs
from uvit.store.show import choose_rows, decode_pairs, show
from uvit.store.writer import StoreWriter
from uvit.weights.encoders import fingerprint, load_diffusers_vae


@pytest.fixture
def store(tmp_path: Path, vae_folder: Path) -> Path:
    """12 pairs whose mirrored moments are the negative ones."""
    vae = {"name": str(vae_folder), "sha256": fingerprint(load_diffusers_vae(str(vae_folder)))}
    what = info(num_source_pairs=12, shard_size=12, flipped=True, dtype="float32", token_dtype=None, vae=vae)
    writer = StoreWriter(tmp_path / "store" / "train", what)
    moments = np.random.default_rng(0).standard_normal((12, 8, 2, 2), dtype=np.float32)
    with writer.open_shard(0) as shard:
        ids, captions = [str(i) for i in range(12)], [(f"caption {i}",) for i in range(12)]
        shard.append(EncodedPairs(ids, captions, moments, -moments, np.zeros((12, 3, 5)), None), next_row=12)
        shard.finish()
    writer.finish(np.zeros((3, 5), np.float32), None)
    return tmp_path / "store"


def test_the_means_are_decoded_and_mirrored_ones_stand_beside(store: Path, tmp_path: Path, vae_folder: Path) -> None:
    output = tmp_path / "new" / "sheet.png"
    show(FeaturesSampleConfig(str(store), rows="3,10", output=str(output)))
    vae, features = load_diffusers_vae(str(vae_folder)), open_features(store)
    rows = np.array([3, 10])
    mean = torch.from_numpy(features.read(rows, np.zeros(2)).moments[:, :4])
    with torch.inference_mode():
        for side, sign in ((1.0, 1), (0.0, -1)):
            shown, expected = decode_pairs(vae, features, [3, 10], side), to_pil(vae.decode(sign * mean).sample)
            assert [image.tobytes() for image in shown] == [image.tobytes() for image in expected]
    with Image.open(output) as image:
        assert image.text == {"rows": "[3, 10]"}  # type: ignore[attr-defined]
        assert image.width > image.height  # two rows and their mirrored ones, side by side


def test_rows_are_drawn_by_seed_or_named(tmp_path: Path) -> None:
    def rows(**flags: object) -> list[int]:
        return choose_rows(FeaturesSampleConfig("p", **flags), 12)  # type: ignore[arg-type]

    assert rows(num_images=5) == rows(num_images=5) != rows(num_images=5, seed=1)
    assert rows(num_images=40) == list(range(12))
    assert rows(rows="7,1-3") == [7, 1, 2, 3]
    with pytest.raises(UserError, match="--rows 12: the rows are 0 to 11"):
        rows(rows="12")


def test_another_vae_is_told(store: Path, tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = load_diffusers_vae(str(vae_folder))
    torch.nn.init.zeros_(next(vae.parameters()))
    vae.save_pretrained(tmp_path / "other")
    config = FeaturesSampleConfig(str(store), output=str(tmp_path / "a.png"), vae_name_or_path=str(tmp_path / "other"))
    show(config)
    assert "its weights differ" in capsys.readouterr().out
    show(FeaturesSampleConfig(str(store), output=str(tmp_path / "a.png")))
    assert "its weights differ" not in capsys.readouterr().out


def test_npy_features_must_be_told_its_vae(old: Path, tmp_path: Path, vae_folder: Path) -> None:
    with pytest.raises(UserError, match="does not record its VAE; give --vae_name_or_path"):
        show(FeaturesSampleConfig(str(old)))
    config = FeaturesSampleConfig(
        str(old), split="val", output=str(tmp_path / "a.png"), vae_name_or_path=str(vae_folder)
    )
    show(config)
    assert (tmp_path / "a.png").is_file()
