"""The port's folders draw the port's pictures; weights alone are read as they were trained; what is wrong is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.port import FIXTURES, PORT_FOLDER, TINY, same, tiny_unet
from uvit import UViTPipeline
from uvit.errors import UserError
from uvit.export.formats import save_pth, write_paddlemix, write_trainer
from uvit.weights.components import (
    PADDLEMIX,
    TRAINED,
    Conventions,
    load_text_encoder,
    pipeline_components,
    read_components,
    read_network,
)
from uvit.weights.detect import is_third_party
from uvit.weights.encoders import tokenize
from uvit.weights.pdparams import read_pdparams, write_pdparams
from uvit.weights.unet import is_norm, transpose_unet

TOLERANCE = 5e-6


@pytest.fixture(params=["safetensors", "pdparams", "original pdparams"])
def port_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """PaddleMIX wrote the first. The second is our copy of it, and the third has the U-ViT as PaddleMIX wrote it."""
    if request.param == "safetensors":
        return PORT_FOLDER
    if request.param == "pdparams":
        write_paddlemix(read_components(PORT_FOLDER), tmp_path, "pdparams")
        return tmp_path
    folder = tmp_path / "port"
    shutil.copytree(PORT_FOLDER, folder)
    (folder / "unet" / "diffusion_paddle_model.safetensors").unlink()
    shutil.copy(FIXTURES / "port_pipeline_unet.pdparams", folder / "unet" / "model_state.pdparams")
    return folder


def test_the_ports_pictures(port_folder: Path, drawn: dict[str, Tensor]) -> None:
    pipeline = UViTPipeline.from_pretrained(port_folder)
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.config.latent_scale, pipeline.config.timestep_labels) == (0.18215, "0..999")
    prompts = ["the people and red", "a thing at the bus stop"]
    assert torch.equal(tokenize(pipeline.tokenizer, prompts, 77), drawn["input_ids"])
    assert torch.equal(tokenize(pipeline.tokenizer, ["", ""], 77), drawn["uncond_input_ids"])
    assert (pipeline.encode_prompt(prompts) - drawn["prompt_embeds"]).abs().max() < TOLERANCE
    for guidance in ("1.0", "7.5"):
        wanted = {name: drawn[f"ddim10_gs{guidance}/{name}"] for name in ("timesteps", "latents_final", "image")}
        options: dict[str, Any] = {"guidance_scale": float(guidance), "num_inference_steps": 10}
        options |= {"latents": drawn["noise"]}
        latents = pipeline(prompts, output_type="latent", **options).images
        images = pipeline(prompts, output_type="np", **options).images
        assert torch.equal(pipeline.scheduler.timesteps, wanted["timesteps"])
        assert (latents - wanted["latents_final"]).abs().max() < TOLERANCE * wanted["latents_final"].abs().max()
        assert np.abs(images - wanted["image"].numpy()).max() < TOLERANCE


def test_both_conventions_of_the_port_count(drawn: dict[str, Tensor]) -> None:
    """Or the test above would hold without them."""
    pipeline = UViTPipeline.from_pretrained(PORT_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(timestep_labels="1..1000")
    options: dict[str, Any] = {"num_inference_steps": 10, "latents": drawn["noise"], "guidance_scale": 1.0}
    latents = pipeline(["the people and red", ""], output_type="latent", **options).images
    assert (latents[0] - drawn["ddim10_gs1.0/latents_final"][0]).abs().max() > 0.01


def test_what_the_report_says() -> None:
    report = read_components(PORT_FOLDER).report
    assert len(report.read) == 5 and len(report.converted) == 3 and report.dropped == []
    assert report.defaulted == [
        "latent scale 0.18215, timesteps 0..999, as in the PaddleMIX pipeline; prediction type epsilon"
    ]
    trained = read_components(PORT_FOLDER, conventions="trained")
    assert trained.conventions == TRAINED and "timesteps 1..1000, as in training" in trained.report.defaulted[0]


def test_conventions_that_a_folder_says(tmp_path: Path) -> None:
    components = read_components(PORT_FOLDER)
    components.conventions = Conventions(0.5, prediction_type="v_prediction")
    write_paddlemix(components, tmp_path, "safetensors")
    assert read_components(tmp_path).conventions == components.conventions
    (tmp_path / "uvit_conventions.json").write_text('{"latent_scale": 1}')
    with pytest.raises(
        UserError, match="must have the keys latent_scale, latent_shift, latent_std, latents, timestep_labels, "
    ):
        read_components(tmp_path)


# Weights alone


def test_the_official_codes_checkpoint(tmp_path: Path) -> None:
    ema, raw = tiny_unet(1), tiny_unet(2)
    for name, unet in (("nnet_ema", ema), ("nnet", raw)):
        save_pth(unet.state_dict(), tmp_path / f"{name}.pth")
    torch.save({"state": {}}, tmp_path / "optimizer.pth")
    torch.save(7, tmp_path / "step.pth")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    components = read_components(tmp_path)
    assert same(components.unet.state_dict(), ema.state_dict()) and components.raw_unet is not None
    assert same(components.raw_unet, raw.state_dict())
    assert components.conventions == TRAINED and any("optimizer.pth" in line for line in components.report.dropped)
    assert same(read_components(tmp_path, use_ema=False).unet.state_dict(), raw.state_dict())
    assert same(read_components(tmp_path / "nnet.pth").unet.state_dict(), raw.state_dict())


def trainer_file(path: Path, updated: bool) -> dict[str, Tensor]:
    """Of the port trainer's network, whose norms have no weights; -> its U-ViT."""
    with np.load(FIXTURES / "uvit_train_small.npz", allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("weights/")]
        weights = {name.removeprefix("weights/"): torch.from_numpy(file[name]) for name in names}
    ours = {f"unet.{name}": value for name, value in transpose_unet(weights).items()}
    ema = {f"model_ema.{n.replace('.', '')}": v * 0.5 * updated for n, v in transpose_unet(weights).items()}
    write_pdparams(path, ours | ema | {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)})
    return weights


def test_the_port_trainers_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model_state.pdparams"
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY | {"num_layers": 4}))
    weights = trainer_file(path, updated=True)
    for use_ema, factor in ((True, 0.5), (False, 1)):
        components = read_components(path, use_ema, str(config))
        found = components.unet.state_dict()
        assert all(torch.equal(found[name], value * factor) for name, value in weights.items())
        assert all((found[name] == name.endswith("weight")).all() for name in found if is_norm(name))
        assert components.report.dropped == [f"{path}: arrays of no network: alphas_cumprod"]
        assert components.conventions == TRAINED


def test_an_average_that_was_never_updated_is_not_taken(tmp_path: Path) -> None:
    """The port's trainer leaves it as it was at the first step, when pos_embed was 0."""
    path = tmp_path / "model_state.pdparams"
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"num_layers": 4}))
    weights = trainer_file(path, updated=False)
    components = read_components(path, True, str(tmp_path / "tiny.json"))
    assert torch.equal(components.unet.pos_embed, weights["pos_embed"])
    assert any("was never updated" in line for line in components.report.dropped)


def test_a_trainers_checkpoint_with_its_encoders(tmp_path: Path) -> None:
    """Their configs are not in it, but beside it, or flags name others."""
    source = read_components(PORT_FOLDER)
    for name, value in source.unet.named_parameters():
        if is_norm(name):
            value.copy_(torch.full_like(value, name.endswith("weight")))
    write_trainer(source, tmp_path)
    content = read_pdparams(tmp_path / "model_state.pdparams")
    assert "text_encoder.text_model.transformer.layers.0.norm1.weight" in content
    again = read_components(tmp_path)
    for name in ("unet", "vqvae", "text_encoder"):
        assert same(getattr(again, name).state_dict(), getattr(source, name).state_dict())
    assert (again.vqvae.config["norm_num_groups"], again.text_encoder.config.num_attention_heads) == (8, 4)
    assert again.conventions == source.conventions
    for name, said in (("text_encoder", "text encoder of width 32"), ("vqvae", r"VAE of widths \[16, 16")):
        (tmp_path / f"{name}.json").unlink()
        with pytest.raises(UserError, match=said):
            read_components(tmp_path)
    shutil.copy(PORT_FOLDER / "vqvae" / "config.json", tmp_path)
    assert read_components(tmp_path, overridden=["text_encoder"]).vqvae.config["norm_num_groups"] == 8
    (tmp_path / "unet.json").unlink()
    config = str(PORT_FOLDER / "unet" / "config.json")
    assert read_components(tmp_path, config_file=config, overridden=["text_encoder", "vqvae"]).vqvae is None


def test_parts_of_others(tmp_path: Path) -> None:
    unet = read_network(PORT_FOLDER / "unet", "unet")
    assert same(unet.state_dict(), read_components(PORT_FOLDER).unet.state_dict())
    assert read_network(PORT_FOLDER, "vqvae").config["block_out_channels"] == [16] * 4
    with pytest.raises(UserError, match=r"has no text_encoder; it holds: .*a U-ViT"):
        read_network(PORT_FOLDER / "unet", "text_encoder")
    assert is_third_party(str(PORT_FOLDER)) and is_third_party(str(PORT_FOLDER / "unet"))
    assert not is_third_party(None) and not is_third_party("openai/clip") and not is_third_party(str(tmp_path))
    assert is_third_party(PORT_FOLDER) and not is_third_party(tmp_path)


def test_a_text_encoder_of_the_port(tmp_path: Path) -> None:
    """Its file is called as everybody's is."""
    wanted = read_components(PORT_FOLDER).text_encoder.state_dict()
    assert same(load_text_encoder(str(PORT_FOLDER / "text_encoder")).state_dict(), wanted)


def test_a_folder_of_networks_that_are_no_pipeline(tmp_path: Path) -> None:
    whole = read_components(PORT_FOLDER)
    for name in ("unet", "vqvae", "text_encoder", "tokenizer"):
        getattr(whole, name).save_pretrained(tmp_path / name)
    components = read_components(tmp_path, overridden=["tokenizer"])
    assert components.tokenizer is None and read_components(tmp_path).tokenizer is not None
    for name in ("unet", "vqvae", "text_encoder"):
        assert same(getattr(components, name).state_dict(), getattr(whole, name).state_dict())
    (tmp_path / "vqvae" / "config.json").unlink()
    with pytest.raises(UserError, match=f"^{tmp_path}/vqvae: an AutoencoderKL .* cannot be loaded"):
        read_components(tmp_path)


def test_a_pipeline_needs_all_its_parts(tmp_path: Path) -> None:
    assert pipeline_components("some/hub-id", {}) is None and pipeline_components(tmp_path, {}) is None
    with pytest.raises(UserError, match="has no vqvae, text_encoder, tokenizer, scheduler; pass them"):
        pipeline_components(PORT_FOLDER / "unet", {})
    given = {name: object() for name in ("vqvae", "text_encoder", "tokenizer", "scheduler")}
    arguments = pipeline_components(PORT_FOLDER / "unet", given)
    assert arguments is not None and arguments["vqvae"] is given["vqvae"]
    assert arguments["latent_scale"] == TRAINED.latent_scale


# What is wrong


def changed(folder: Path) -> Path:
    shutil.copytree(PORT_FOLDER, folder / "port")
    return folder / "port"


def test_damaged_folders(tmp_path: Path) -> None:
    port = changed(tmp_path)
    path = port / "unet" / "diffusion_paddle_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"^{path}: is damaged or truncated"):
        read_components(port)
    path.write_bytes(whole)
    arrays = load_file(path)
    save_file({name: value for name, value in arrays.items() if "out_blocks.1.mlp" not in name}, path)
    with pytest.raises(UserError, match=f"^{path}: is not complete, 4 arrays of the U-ViT are missing"):
        read_components(port)
    shutil.copy(port / "vqvae" / path.name, path)
    with pytest.raises(UserError, match=f"^{path}: is a VAE, where the pipeline's unet should be"):
        read_components(port)
    path.unlink()
    with pytest.raises(UserError, match="unet: holds no weights"):
        read_components(port)
    shutil.rmtree(port / "vqvae")
    with pytest.raises(UserError, match=f"^{port}: is not complete, it has no vqvae"):
        read_components(port)


@pytest.mark.parametrize("name", ["os", "DDIMPipeline", None])
def test_schedulers_are_diffusers_own(name: str | None, tmp_path: Path) -> None:
    port = changed(tmp_path)
    (port / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=f"{name} is no scheduler of diffusers"):
        UViTPipeline.from_pretrained(port)


def test_broken_json_and_folders_of_nothing(tmp_path: Path) -> None:
    port = changed(tmp_path)
    (port / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        read_components(port)
    (port / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="must map names to values"):
        read_components(port)
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_components(tmp_path / "none")


JUNK = st.one_of(st.none(), st.booleans(), st.integers(-2, 70), st.text(max_size=3), st.lists(st.integers(0, 9)))
CONFIGS = [
    (name, key)
    for name in ("unet", "vqvae", "text_encoder")
    for key in json.loads((PORT_FOLDER / name / "config.json").read_text())
]


@pytest.fixture(scope="module")
def port_to_change(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tmp_path_factory.mktemp("folder"))


@settings(max_examples=80, deadline=None)
@given(place=st.sampled_from(CONFIGS), junk=JUNK)
def test_configs_with_anything_in_them(place: tuple[str, str], junk: Any, port_to_change: Path) -> None:
    """Read, or one sentence that names the part."""
    name, key = place
    path = port_to_change / name / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {key: junk}))
    try:
        read_network(port_to_change / name, name)  # type: ignore[arg-type]
    except UserError as error:
        assert str(path.parent) in str(error)
    finally:
        path.write_text(whole)


def test_two_of_a_kind(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_pth(tiny_unet(seed).state_dict(), tmp_path / f"model{seed}.pth")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(UserError, match=r"model2\.pth: is a second unet in this folder; name one file"):
        read_components(tmp_path)


def test_the_same_in_two_containers_is_read_once(tmp_path: Path) -> None:
    weights = transpose_unet(tiny_unet().state_dict())
    save_file(weights, tmp_path / "diffusion_paddle_model.safetensors", {"format": "pd"})
    write_pdparams(tmp_path / "model_state.pdparams", weights)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert same(read_components(tmp_path).unet.state_dict(), tiny_unet().state_dict())


def test_ports_conventions_are_what_it_does() -> None:
    assert Conventions(0.18215, timestep_labels="0..999") == PADDLEMIX
