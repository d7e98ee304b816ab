"""What a place holds is told before a network of it is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.port import PORT_FOLDER, tiny_unet
from uvit.export.formats import save_pth
from uvit.weights.detect import config_beside, first_that_has, has_part, is_third_party, missing_parts, part_folders
from uvit.weights.pdparams import write_pdparams


@pytest.mark.parametrize("said", [{"format": "pd"}, {"format": "np"}, {"format": "pt"}, None])
def test_the_ports_layout_whatever_its_file_is_called(said: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(PORT_FOLDER / "text_encoder", tmp_path / "text")
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays, folder / "model.safetensors", said)
    assert is_third_party(str(folder))
    ours = {name: value.t().contiguous() if ".mlp.fc" in name else value for name, value in arrays.items()}
    save_file({**ours, "of.another": arrays[min(arrays)].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert not is_third_party(str(folder))
    (folder / "model.safetensors").write_bytes(b"\0" * 8 + b"{")  # whoever reads it says that it is broken
    assert not is_third_party(str(folder))


def test_the_config_of_each_network(tmp_path: Path) -> None:
    weights = tmp_path / "model_state.pdparams"
    assert config_beside(weights, "unet") is None
    (tmp_path / "config.json").write_text('{"block_out_channels": [8]}')
    assert config_beside(weights, "vqvae") == tmp_path / "config.json"
    assert config_beside(weights, "unet") is None and config_beside(weights, "text_encoder") is None
    (tmp_path / "vqvae.json").write_text('{"block_out_channels": [16]}')
    assert config_beside(weights, "vqvae") == tmp_path / "vqvae.json"


def test_what_a_place_has(tmp_path: Path) -> None:
    parts = ("unet", "vqvae", "text_encoder", "tokenizer")

    def of(name: Path | str) -> list[str]:
        return [part for part in parts if has_part(str(name), part)]

    assert of(PORT_FOLDER) == of("somebody/model") == list(parts)
    assert of(PORT_FOLDER / "vqvae") == ["vqvae"] and of(tmp_path) == []
    (tmp_path / "official").mkdir()
    save_pth(tiny_unet().state_dict(), tmp_path / "official" / "nnet_ema.pth")
    assert of(tmp_path / "official") == of(tmp_path / "official" / "nnet_ema.pth") == ["unet"]
    both = {f"unet.{name}": value for name, value in tiny_unet().state_dict().items()}
    write_pdparams(tmp_path / "model_state.pdparams", both | {"vae.x": next(iter(both.values()))})
    assert of(tmp_path / "model_state.pdparams") == ["unet", "vqvae"]
    (tmp_path / "alone" / "vae").mkdir(parents=True)
    assert of(tmp_path / "alone") == ["vqvae"] == list(part_folders(tmp_path / "alone"))
    assert first_that_has("vqvae", str(PORT_FOLDER), "other") == str(PORT_FOLDER)
    assert first_that_has("vqvae", str(tmp_path / "official"), None, "other") == "other"
    assert first_that_has("vqvae", None, None) is None


def test_what_a_pipeline_lacks(tmp_path: Path) -> None:
    index = {"_class_name": "x", "latent_scale": 0.5, "unet": ["uvit", "x"], "tokenizer": ["a", "b"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet").mkdir()
    assert missing_parts(tmp_path) == ["tokenizer"]
