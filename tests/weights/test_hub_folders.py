"""Folders as they lie on the Hub: the same weights in several formats and precisions, and encoders of whole models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from uvit.weights.components import load_text_encoder, load_vae

TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "vocab_size": 300, "hidden_act": "gelu", "layer_norm_eps": 1e-3,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def halved(folder: Path, stem: str, suffix: str = ".safetensors") -> None:
    weights = {name: value.half() for name, value in load_file(folder / f"{stem}.safetensors").items()}
    if suffix == ".safetensors":
        save_file(weights, folder / f"{stem}.fp16.safetensors", {"format": "pt"})
    else:
        torch.save(weights, folder / f"{stem}.fp16.bin")


def pickled(folder: Path, stem: str, name: str) -> None:
    torch.save(load_file(folder / f"{stem}.safetensors"), folder / name)


@pytest.mark.parametrize("formats", [("safetensors",), ("safetensors", "bin"), ("bin",)])
def test_the_text_encoder_of_a_whole_clip(formats: tuple[str, ...], tmp_path: Path) -> None:
    """Its settings are in a part of its config.json, and differ from those of OpenAI's CLIP."""
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)).eval()
    clip.save_pretrained(tmp_path)
    if "bin" in formats:
        torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
    if "safetensors" not in formats:
        (tmp_path / "model.safetensors").unlink()
    found = load_text_encoder(str(tmp_path))
    ids = torch.randint(3, 300, (2, 16))
    with torch.inference_mode():
        expected = clip.text_model(input_ids=ids).last_hidden_state
        assert torch.equal(found(input_ids=ids).last_hidden_state, expected)


def test_what_is_assumed_of_a_text_encoder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)).text_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    pickled(tmp_path, "model", "pytorch_model.bin")
    load_text_encoder(str(tmp_path))
    assert "2 attention heads of 64, quick_gelu, as in CLIP" in capsys.readouterr().out


def test_other_text_encoders_with_their_older_format(tmp_path: Path) -> None:
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    model.save_pretrained(tmp_path)
    pickled(tmp_path, "model", "pytorch_model.bin")
    assert type(load_text_encoder(str(tmp_path))) is BertModel


@pytest.mark.parametrize("has", ["safetensors", "the bin of the unet", "all bins", "half precision", "all"])
def test_a_stable_diffusion_pipeline(has: str, tmp_path: Path) -> None:
    """Its VAE and text encoder are taken, from the pipeline's folder and from their own."""
    vae, text, unet = (tmp_path / name for name in ("vae", "text_encoder", "unet"))
    tiny_vae_folder(vae, norm_num_groups=4)
    tiny_text_encoder_folder(text)
    unet.mkdir()
    save_file({"conv_in.weight": torch.ones(2, 2)}, unet / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    index = {
        "vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None],
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if has in ("the bin of the unet", "all bins", "all"):
        pickled(unet, "diffusion_pytorch_model", "diffusion_pytorch_model.bin")
    if has in ("all bins", "all"):
        pickled(vae, "diffusion_pytorch_model", "diffusion_pytorch_model.bin")
        pickled(text, "model", "pytorch_model.bin")
    if has in ("half precision", "all"):
        for suffix in (".safetensors", ".bin"):
            halved(vae, "diffusion_pytorch_model", suffix)
            halved(text, "model", suffix)
    loads: list[tuple[Callable[[str], Any], Path, Path]] = [
        (load_vae, vae, vae / "diffusion_pytorch_model.safetensors"),
        (load_text_encoder, text, text / "model.safetensors"),
    ]
    for load, folder, weights in loads:
        expected = load_file(weights)
        for place in (tmp_path, folder):
            found = load(str(place))
            state = found.state_dict()
            assert all(torch.equal(state[name.removeprefix("text_model.")], expected[name]) for name in expected)
            assert getattr(found.config, "norm_num_groups", 4) == 4


def test_older_formats_alone_in_two_precisions(tmp_path: Path) -> None:
    tiny_text_encoder_folder(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    halved(tmp_path, "model", ".bin")
    pickled(tmp_path, "model", "model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = load_text_encoder(str(tmp_path)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_pipeline_with_pickled_encoders(tmp_path: Path) -> None:
    tiny_vae_folder(tmp_path / "vae")
    tiny_text_encoder_folder(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    for name, stem, load in (
        ("vae", "diffusion_pytorch_model", load_vae),
        ("text_encoder", "model", load_text_encoder),
    ):
        expected = load_file(tmp_path / name / f"{stem}.safetensors")
        pickled(tmp_path / name, stem, f"{stem}.bin")
        (tmp_path / name / f"{stem}.safetensors").unlink()
        found = load(str(tmp_path)).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_half_precision_beside_an_older_format_alone(tmp_path: Path) -> None:
    """The libraries open neither by themselves."""
    for name, stem, make, load in (
        ("vae", "diffusion_pytorch_model", tiny_vae_folder, load_vae),
        ("text", "model", tiny_text_encoder_folder, load_text_encoder),
    ):
        folder = make(tmp_path / name)
        expected = load_file(folder / f"{stem}.safetensors")
        halved(folder, stem)
        pickled(folder, stem, f"{stem}.bin")
        (folder / f"{stem}.safetensors").unlink()
        found = load(str(folder)).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_other_text_encoders_of_a_pipeline_with_code(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "modeling_uvit.py").write_text("")
    (tmp_path / "model_index.json").write_text('{"unet": ["modeling_uvit", "UViTT2IModel"]}')
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    model.save_pretrained(tmp_path / "text_encoder")
    assert type(load_text_encoder(str(tmp_path))) is BertModel
