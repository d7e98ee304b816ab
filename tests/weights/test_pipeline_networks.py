"""A network with too few weights, or too many, is refused: the libraries would fill it with random numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.sample.parts import tiny_pipeline_folder
from uvit.errors import UserError
from uvit.export.convert import open_own_pipeline
from uvit.sample.load import open_pipeline
from uvit.weights.pipeline_networks import load_pipeline_encoders

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vqvae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"), num_layers=4)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("network", FILES)
@pytest.mark.parametrize("edit", ["lacks", "has too much"])
def test_weights_that_do_not_fit_the_network(network: str, edit: str, copy: Path) -> None:
    path = copy / network / FILES[network]
    weights = {name: value.clone() for name, value in load_file(path).items()}
    name = sorted(name for name in weights if name.endswith("weight"))[-1]
    if edit == "lacks":
        del weights[name]
    else:
        name = "left.over"
        weights[name] = torch.zeros(1)
    save_file(weights, path, {"format": "pt"})
    for opened in (lambda: open_pipeline(str(copy), "cpu"), lambda: open_own_pipeline(copy)):
        with pytest.raises(UserError, match=rf"{network} {edit}: {name}\)"):
            opened()


def test_a_config_with_fewer_blocks(copy: Path) -> None:
    config = (copy / "unet" / "config.json").read_text(encoding="utf-8")
    fewer = config.replace('"num_layers": 4', '"num_layers": 2')
    assert fewer != config
    (copy / "unet" / "config.json").write_text(fewer, encoding="utf-8")
    with pytest.raises(UserError, match="unet has too much: in_blocks"):
        open_pipeline(str(copy), "cpu")


def test_only_the_file_that_is_opened_counts(copy: Path) -> None:
    path = copy / "unet" / FILES["unet"]
    weights = {name: value.clone() for name, value in load_file(path).items()}
    save_file(weights, path.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    save_file({"lora.a": torch.zeros(1)}, path.with_name("lora.safetensors"), {"format": "pt"})
    open_pipeline(str(copy), "cpu")
    del weights["pos_embed"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="unet lacks: pos_embed"):
        open_pipeline(str(copy), "cpu")


def test_all_networks_of_a_whole_pipeline(folder: Path) -> None:
    networks = {"unet": open_pipeline(str(folder), "cpu", "bfloat16").unet} | load_pipeline_encoders(
        folder, torch.bfloat16
    )
    assert {*networks} == {*FILES}
    for name, network in networks.items():
        stored = load_file(folder / name / FILES[name])
        assert {key: value.dtype for key, value in network.state_dict().items() if key in stored} == dict.fromkeys(
            stored, torch.bfloat16
        )
