"""Features of a vision model in a store: from the model to the disk, and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    EfficientNetConfig,
    EfficientNetImageProcessorPil,
    EfficientNetModel,
)

from tests.test_pixels import extract_config
from tests.tiny import tiny_vit_folder
from uvit.config.store import FeaturesInfoConfig, FeaturesMergeConfig, FeaturesVerifyConfig
from uvit.errors import UserError
from uvit.extract.extract import extract
from uvit.extract.teacher import load_teacher
from uvit.store.info import info
from uvit.store.merge import merge
from uvit.store.reader import FeatureStore
from uvit.store.shard import EncodedPairs, ShardWriter
from uvit.store.verify import verify

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def tiny_dinov2(path: Path) -> Path:
    """Images of 28 x 28 pixels, after a resize to 32: a 4 x 4 grid, and a class token before it."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(path)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**sizes, image_mean=MEAN, image_std=STD).save_pretrained(path)
    return path


def tiny_efficientnet(path: Path) -> Path:
    torch.manual_seed(0)
    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_block_repeats=[1] * 7
    )
    EfficientNetModel(config).save_pretrained(path)
    EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_dinov2(tmp_path_factory.mktemp("teachers") / "dinov2"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, dinov2: str) -> Path:
    """A store of 72 pairs with features of a teacher, and one without."""
    folder = tmp_path_factory.mktemp("stores")
    for name, teacher in (("with", dinov2), ("without", None)):
        extract(extract_config(folder / name, split="heldout", teacher=teacher, shard_size=50, batch_size=8))
    return folder


def pixels(side: int, num_images: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, 3, side, side), np.uint8)


def normalized(images: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


def test_the_grid_of_tokens_is_that_of_the_whole_image(dinov2: str) -> None:
    """Nothing is cropped, though the processor would, and the class token is left out."""
    teacher, model = load_teacher(dinov2, "name"), Dinov2Model.from_pretrained(dinov2).eval()
    assert (teacher.features_shape, teacher.side, teacher.record["name"]) == ((32, 4, 4), 28, "name")
    images = pixels(28)
    with torch.inference_mode():
        tokens = model(normalized(images)).last_hidden_state
        features = teacher.encode(images)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        torch.testing.assert_close(features[:, :, row, column], tokens[:, 1 + 4 * row + column])


def test_a_map_is_taken_as_it_is(tmp_path: Path) -> None:
    teacher = load_teacher(str(tiny_efficientnet(tmp_path / "net")), "name")
    model = EfficientNetModel.from_pretrained(tmp_path / "net").eval()
    images = pixels(32)
    prepared = teacher.processor(list(images.transpose(0, 2, 3, 1)), do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        expected = model(prepared["pixel_values"].float()).last_hidden_state
        torch.testing.assert_close(teacher.encode(images), expected)
    assert teacher.features_shape == tuple(expected.shape[1:])


def test_a_model_without_a_grid_is_one_sentence(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "text")
    tiny_vit_folder(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").rename(tmp_path / "text" / "preprocessor_config.json")
    problems = {"text": "gives no grid of features", "vit": "cannot be loaded", "no": "no such folder"}
    for place, message in problems.items():
        with pytest.raises(UserError) as error:
            load_teacher(str(tmp_path / place), "name")
        assert str(error.value).startswith(f"--teacher {tmp_path / place}: ") and message in str(error.value)


def test_mirrored_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--teacher net and --random_flip: features of mirrored images are not stored"):
        extract_config(tmp_path, teacher="net", random_flip=True)


def test_a_store_has_the_features_of_its_images(stores: Path, dinov2: str) -> None:
    store, rows = FeatureStore(stores / "with" / "heldout"), np.array([0, 49, 50, 71])
    assert store.teacher_shape == (32, 4, 4)
    assert store.teacher_sha256 == load_teacher(dinov2, "name").record["sha256"]
    images = store.read(rows, np.zeros(4)).images
    assert images is not None
    with torch.inference_mode():
        expected = load_teacher(dinov2, "name").encode(images)
    # A batch of another size rounds otherwise.
    np.testing.assert_allclose(store.read_teacher(rows), expected.numpy(), rtol=0, atol=2e-3 * expected.abs().max())
    assert FeatureStore(stores / "without" / "heldout").teacher_shape is None


def test_it_is_described_verified_and_merged(
    stores: Path, tmp_path: Path, dinov2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    info(FeaturesInfoConfig(str(stores / "with")))
    said = capsys.readouterr().out
    assert "teacher's features  (32, 4, 4) float16" in said and dinov2 in said
    folder = tmp_path / "merged"
    merge(FeaturesMergeConfig((str(stores / "with"),) * 2, str(folder), split="heldout", disable_tqdm=True))
    merged, rows = FeatureStore(folder / "heldout"), np.array([0, 71])
    assert np.array_equal(merged.read_teacher(rows), merged.read_teacher(rows + 72))
    assert verify(FeaturesVerifyConfig(str(folder), disable_tqdm=True)) == 0
    with pytest.raises(UserError) as error:
        paths = (str(stores / "with"), str(stores / "without"))
        merge(FeaturesMergeConfig(paths, str(tmp_path / "other"), split="heldout", disable_tqdm=True))
    assert "only stores with the same settings can be merged" in str(error.value)
    features = np.load(folder / "heldout" / "teacher-00001.npy", mmap_mode="r+")
    features[3] = np.nan
    features.flush()
    assert verify(FeaturesVerifyConfig(str(folder), disable_tqdm=True)) == 1


def test_a_killed_extraction_resumes_with_the_same_bytes(
    stores: Path, tmp_path: Path, dinov2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = extract_config(tmp_path / "store", split="heldout", teacher=dinov2, shard_size=50, batch_size=8)

    def stop(shard: ShardWriter, part: EncodedPairs, next_row: int) -> None:
        if next_row > 30:
            raise KeyboardInterrupt
        append(shard, part, next_row)

    append = ShardWriter.append
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "append", stop)
        extract(config)
    extract(config)
    for name in ("teacher-00000.npy", "teacher-00001.npy", "manifest.json"):
        whole = (stores / "with" / "heldout" / name).read_bytes()
        assert (tmp_path / "store" / "heldout" / name).read_bytes() == whole
    fields = json.loads(whole)
    assert fields["teacher"]["name"] == dinov2 and fields["teacher_shape"] == [32, 4, 4]
