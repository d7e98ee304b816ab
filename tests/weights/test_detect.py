"""What files and folders hold is told by the names in them, before a network is built."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.port import PORT_FOLDER, tiny_unet
from uvit.errors import UserError
from uvit.export.formats import save_pth
from uvit.weights.detect import (
    WRAPPERS,
    component_folders,
    config_beside,
    find_networks,
    first_that_has,
    has_component,
    is_ema_name,
    is_third_party,
    missing_components,
    unwrap,
)
from uvit.weights.pdparams import write_pdparams

UNET = dict(tiny_unet().state_dict())
VAE = {"encoder.mid_block.resnets.0.conv1.weight": torch.zeros(1)}
PATH = Path("weights.pth")


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (UNET, "uvit"),
        (VAE, "vae"),
        ({"decoder.mid.block_1.conv1.weight": torch.zeros(1)}, "ldm_vae"),
        ({"text_model.embeddings.token_embedding.weight": torch.zeros(1)}, "text_encoder"),
        ({"text_model.token_embedding.weight": torch.zeros(1)}, "text_encoder"),
    ],
)
def test_kinds(tensors: dict[str, torch.Tensor], kind: str) -> None:
    for wrapper in ("", "state_dict.", "module.", "state_dict.model.", "net._orig_mod.", "nnet.", "unet.", "a.b.c."):
        (found,) = find_networks(unwrap({wrapper + name: value for name, value in tensors.items()}, PATH), PATH)
        assert found.kind == kind and found.tensors.keys() == tensors.keys() and not found.is_ema


@given(data=st.data())
def test_wrappers_anywhere_and_in_any_order(data: st.DataObject) -> None:
    wrappers = st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3)
    wrapped = {}
    for name, value in UNET.items():
        parts = [[*data.draw(wrappers), part] for part in name.split(".")]
        wrapped[".".join(part for group in parts for part in group)] = value
    assert unwrap(wrapped, PATH) == UNET


def test_two_arrays_of_one_name() -> None:
    one = torch.zeros(1)
    assert list(unwrap({"module.a": one, "a": one.clone()}, PATH)) == ["a"]
    with pytest.raises(UserError, match=r"weights.pth: holds two different arrays a, with and without wrappers"):
        unwrap({"module.a": one, "a": one + 1}, PATH)


@pytest.mark.parametrize(
    ("name", "ema"),
    [
        ("ema.", True), ("ema_model.", True), ("model_ema.", True), ("nnet_ema.", True), ("ema_state_dict.", True),
        ("model.EMA.", True), ("ModelEMA.module.", True), ("state_dict_ema.", True), ("ema1.", True),
        ("ema.ema_model.", True), ("averaged_model.", True), ("EMACallback.state_dict.", True), ("ema-0500", True),
        ("ema.online_model.", False), ("model.", False), ("schema.", False), ("", False), ("emanuel", False),
        ("cinema.net.", False), ("nnet_ema", True), ("model_state.ema", True), ("nnet", False),
    ],
)  # fmt: skip
def test_the_usual_names_of_ema_weights(name: str, ema: bool) -> None:
    assert is_ema_name(name) is ema


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (UNET | VAE, "holds a U-ViT and a VAE under the same names; give one file for each"),
        ({"layer.0": torch.zeros(1)}, r"holds 1 arrays \(layer.0\), which are not a U-ViT, a VAE or a CLIP"),
        (UNET | {"label_emb.weight": torch.zeros(1)}, "is a class-conditional U-ViT"),
        (UNET | {"time_embed.0.weight": torch.zeros(1)}, "MLP on its time token"),
    ],
)
def test_what_is_not_known(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UserError, match=f"^weights.pth: .*{said}"):
        find_networks(tensors, PATH)


# Files, folders, configs


@pytest.mark.parametrize("metadata", [{"format": "pd"}, {"format": "np"}, {"format": "pt"}, None])
def test_paddlemix_layout_whatever_its_file_is_called(metadata: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(PORT_FOLDER / "text_encoder", tmp_path / "text")
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays, folder / "model.safetensors", metadata)
    assert is_third_party(str(folder))
    ours = {name: value.t().contiguous() if ".mlp.fc" in name else value for name, value in arrays.items()}
    save_file({**ours, "of.another": arrays[min(arrays)].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert not is_third_party(str(folder))
    (folder / "model.safetensors").write_bytes(b"\0" * 8 + b"{")  # the reader reports that it is damaged
    assert not is_third_party(str(folder))


def test_the_config_of_each_network(tmp_path: Path) -> None:
    weights = tmp_path / "model_state.pdparams"
    assert config_beside(weights, "unet") is None
    (tmp_path / "config.json").write_text('{"block_out_channels": [8]}')
    assert config_beside(weights, "vqvae") == tmp_path / "config.json"
    assert config_beside(weights, "unet") is None and config_beside(weights, "text_encoder") is None
    (tmp_path / "vqvae.json").write_text('{"block_out_channels": [16]}')
    assert config_beside(weights, "vqvae") == tmp_path / "vqvae.json"


def test_the_components_of_a_source(tmp_path: Path) -> None:
    components = ("unet", "vqvae", "text_encoder", "tokenizer")

    def of(name: Path | str) -> list[str]:
        return [component for component in components if has_component(str(name), component)]

    assert of(PORT_FOLDER) == of("somebody/model") == list(components)
    assert of(PORT_FOLDER / "vqvae") == ["vqvae"] and of(tmp_path) == []
    (tmp_path / "official").mkdir()
    save_pth(tiny_unet().state_dict(), tmp_path / "official" / "nnet_ema.pth")
    assert of(tmp_path / "official") == of(tmp_path / "official" / "nnet_ema.pth") == ["unet"]
    both = {f"unet.{name}": value for name, value in tiny_unet().state_dict().items()}
    write_pdparams(tmp_path / "model_state.pdparams", both | {f"vae.{name}": value for name, value in VAE.items()})
    assert of(tmp_path / "model_state.pdparams") == ["unet", "vqvae"]
    (tmp_path / "alone" / "vae").mkdir(parents=True)
    assert of(tmp_path / "alone") == ["vqvae"] == list(component_folders(tmp_path / "alone"))
    assert first_that_has("vqvae", str(PORT_FOLDER), "other") == str(PORT_FOLDER)
    assert first_that_has("vqvae", str(tmp_path / "official"), None, "other") == "other"
    assert first_that_has("vqvae", None, None) is None


def test_missing_components(tmp_path: Path) -> None:
    index = {"_class_name": "x", "latent_scale": 0.5, "unet": ["uvit", "x"], "tokenizer": ["a", "b"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet").mkdir()
    assert missing_components(tmp_path) == ["tokenizer"]
