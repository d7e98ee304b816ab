"""The network and its inputs equal those of pytorch-fid, torch-fidelity and clean-fid; other networks are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.evaluate.reference import INCEPTION, formula_weights, synthetic_image
from uvit.config.evaluate import InceptionInput
from uvit.errors import UserError
from uvit.evaluate.inception import (
    WEIGHTS_NAMES,
    FIDInception,
    find_inception_weights,
    inception_input,
    load_inception,
    tensorflow_bilinear,
)

IMAGES = [synthetic_image(96, 96, 1), synthetic_image(400, 310, 2)]
REFERENCES: list[tuple[InceptionInput, str]] = [
    ("pytorch-fid", "pytorch_fid/2048"),
    ("torch-fidelity", "torch_fidelity/2048"),
    ("clean-fid", "clean/2048"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        names = FIDInception().state_dict()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(formula_weights(names), path)
    return path


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.xdist_group("inception")
@pytest.mark.parametrize(("convention", "reference"), REFERENCES)
def test_features_equal_the_reference(convention: InceptionInput, reference: str, weights: Path) -> None:
    network, _ = load_inception(weights)
    with torch.inference_mode():
        features, logits = network(torch.stack([inception_input(image, convention) for image in IMAGES]))
    # Other numbers of threads change 3e-7; the smallest mistake in the network or its input, 3e-3.
    assert relative(features, INCEPTION[reference]) < 1e-5
    if convention == "torch-fidelity":
        assert relative(logits, INCEPTION["torch_fidelity/logits_unbiased"]) < 1e-5


def test_resizes_equal_the_reference() -> None:
    rows = torch.from_numpy(INCEPTION["rows"])
    x = torch.from_numpy(IMAGES[1]).permute(2, 0, 1).float()
    assert torch.equal(tensorflow_bilinear(x)[:, rows], torch.from_numpy(INCEPTION["resize/tf"]))
    half = (inception_input(IMAGES[1])[:, rows] + 1) / 2
    torch.testing.assert_close(half, torch.from_numpy(INCEPTION["resize/torch"]), rtol=0, atol=1e-7)  # 2x - 1 rounds


@pytest.mark.parametrize("convention", ["pytorch-fid", "torch-fidelity", "clean-fid"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (299, 299), (640, 3), (256, 256)])
def test_images_of_any_shape_become_inputs(shape: tuple[int, int], convention: InceptionInput) -> None:
    image = synthetic_image(*shape, 4)
    before = image.copy()
    pixels = inception_input(image, convention)
    assert pixels.shape == (3, 299, 299) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(image, before)
    flat = inception_input(np.full((*shape, 3), 128, np.uint8), convention)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.0), atol=0.004, rtol=0)


@pytest.mark.xdist_group("inception")
def test_safetensors_load_too_and_unused_counters_may_lack(weights: Path, tmp_path: Path) -> None:
    tensors = {n: v for n, v in torch.load(weights).items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "weights.safetensors")
    first, second = load_inception(weights)[0], load_inception(tmp_path / "weights.safetensors")[0]
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_other_networks_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    with torch.device("meta"):
        names = FIDInception().state_dict()
    few = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in names.items()}
    torch.save({**few, "fc.weight": torch.zeros(1000, 2048)}, path)  # torchvision's
    with pytest.raises(UserError, match=r"fc.weight has shape \(1000, 2048\), and should have shape \(1008, 2048\)"):
        load_inception(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"Conv2d_1a_3x3.conv.weight is missing"):
        load_inception(path)


def test_missing_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(UserError, match=r"pt_inception-2015-12-05-6726825d.pth: .*91 MiB, SHA-256 6726825d.* put it"):
        find_inception_weights()
    (tmp_path / "checkpoints").mkdir()
    for name in reversed(WEIGHTS_NAMES):  # what either package has downloaded is found
        (tmp_path / "checkpoints" / name).write_bytes(b"x")
        assert find_inception_weights().name == name
    with pytest.raises(UserError, match=r"^nowhere.pth: "):
        find_inception_weights("nowhere.pth")
