"""Encoders load from wherever they may lie, and say in a sentence why they do not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.weights import encoders

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory, vae_folder: Path, text_encoder_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model_index.json").write_text("{}")
    shutil.copytree(vae_folder, folder / "vqvae")
    shutil.copytree(text_encoder_folder, folder / "text_encoder")
    shutil.copytree(text_encoder_folder, folder / "tokenizer")
    return folder


# Loading


def test_a_pipeline_folder_holds_all_three(pipeline_folder: Path, vae_folder: Path, text_encoder_folder: Path) -> None:
    vae, text_encoder = (
        encoders.load_diffusers_vae(str(pipeline_folder)),
        encoders.load_transformers_encoder(str(pipeline_folder)),
    )
    assert encoders.fingerprint(vae) == encoders.fingerprint(encoders.load_diffusers_vae(str(vae_folder)))
    assert encoders.fingerprint(text_encoder) == encoders.fingerprint(
        encoders.load_transformers_encoder(str(text_encoder_folder))
    )
    assert encoders.load_tokenizer(str(pipeline_folder))("red") == encoders.load_tokenizer(str(text_encoder_folder))(
        "red"
    )
    for model in (vae, text_encoder):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_fingerprint_changes_with_any_weight(vae_folder: Path) -> None:
    vae = encoders.load_diffusers_vae(str(vae_folder))
    before = encoders.fingerprint(vae)
    next(vae.parameters()).view(-1)[0] += 1e-3
    assert encoders.fingerprint(vae) != before


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (encoders.load_diffusers_vae, "--vae_name_or_path"),
        (encoders.load_transformers_encoder, "--text_encoder_name_or_path"),
        (encoders.load_tokenizer, "--tokenizer_name"),
    ],
)
def test_a_place_without_what_is_wanted(load: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for place in ("empty", "missing", "pipeline"):
        with pytest.raises(UserError, match=says):
            load(str(tmp_path / place))


def test_folders_of_something_else(vae_folder: Path, text_encoder_folder: Path) -> None:
    with pytest.raises(UserError, match="not 'AutoencoderKL'"):
        encoders.load_diffusers_vae(str(text_encoder_folder))
    with pytest.raises(UserError, match="--text_encoder_name_or_path"):
        encoders.load_transformers_encoder(str(vae_folder))


@pytest.mark.parametrize(
    "name", ["run/autoencoder_kl.pth", "x.safetensors", "./x", "../absent/x", "/x", "~/nowhere", "a/b/c"]
)
def test_names_that_are_places(name: str) -> None:
    """And no ids of the Hub, which would be asked for them."""
    with pytest.raises(UserError, match=f"^--vae_name_or_path {name}: no such file or folder"):
        encoders.load_diffusers_vae(name)
    assert not encoders.is_local_path("openai/clip-vit-large-patch14") and not encoders.is_local_path("shapes")


def test_a_folder_that_is_no_pipeline_may_hold_them(
    tmp_path: Path, vae_folder: Path, text_encoder_folder: Path
) -> None:
    shutil.copytree(vae_folder, tmp_path / "vqvae")
    wanted = encoders.fingerprint(encoders.load_diffusers_vae(str(vae_folder)))
    assert encoders.fingerprint(encoders.load_diffusers_vae(str(tmp_path))) == wanted
    shutil.copytree(text_encoder_folder, tmp_path / "text_encoder")
    assert encoders.load_transformers_encoder(str(tmp_path)) is not None
    with pytest.raises(UserError, match=f"--tokenizer_name {tmp_path}: .*has no tokenizer files"):
        encoders.load_tokenizer(str(tmp_path))


def test_weights_that_are_not_finite(tmp_path: Path, vae_folder: Path) -> None:
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"][0] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"quant_conv\.bias holds NaN or infinity"):
        encoders.load_diffusers_vae(str(folder))


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, vae_folder: Path, text_encoder_folder: Path) -> None:
    for name, folder, load in [
        ("diffusion_pytorch_model.safetensors", vae_folder, encoders.load_diffusers_vae),
        ("model.safetensors", text_encoder_folder, encoders.load_transformers_encoder),
    ]:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        weights = load_file(copy / name)
        weights.pop(sorted(weights)[0])
        save_file(weights, copy / name, metadata={"format": "pt"})
        with pytest.raises(UserError, match="lack 1 parameters"):
            load(str(copy))


def test_pickled_weights_are_not_read(tmp_path: Path, vae_folder: Path) -> None:
    shutil.copytree(vae_folder, tmp_path / "vae")
    safe = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    with pytest.raises(UserError, match="safetensors"):
        encoders.load_diffusers_vae(str(tmp_path / "vae"))


# Images


def test_moments_and_back(vae_folder: Path) -> None:
    vae = encoders.load_diffusers_vae(str(vae_folder))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = encoders.encode_images(vae, pixels)
    assert moments.shape == (2, 8, 4, 4)
    assert encoders.downsampling_of(vae) == 4
    torch.testing.assert_close(moments[:, :4], vae.encode(pixels).latent_dist.mode())
    images = encoders.decode_latents(vae, 0.5 * moments[:, :4], LatentSpace(0.5))
    assert images.shape == pixels.shape
    assert images.abs().max() <= 1
    torch.testing.assert_close(images, vae.decode(moments[:, :4]).sample.clamp(-1, 1))


def test_the_log_variance_fits_float16(vae_folder: Path) -> None:
    vae = encoders.load_diffusers_vae(str(vae_folder))
    vae.quant_conv.bias[4:] = 1e6
    assert torch.isfinite(encoders.encode_images(vae, torch.zeros(1, 3, 16, 16)).half()).all()


def test_latent_scale_is_the_vaes_own_but_for_stable_diffusions(tmp_path: Path, vae_folder: Path) -> None:
    assert encoders.latent_space_of(encoders.load_diffusers_vae(str(vae_folder))) == LatentSpace(0.5)
    shutil.copytree(vae_folder, tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "config.json").read_text())
    (tmp_path / "sd" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    assert encoders.latent_space_of(encoders.load_diffusers_vae(str(tmp_path / "sd"))) == LatentSpace()


# Captions


def test_clip_reads_ids_alone_and_lets_gradients_through(text_encoder_folder: Path) -> None:
    tokenizer = encoders.load_tokenizer(str(text_encoder_folder))
    text_encoder = encoders.load_transformers_encoder(str(text_encoder_folder)).requires_grad_(True)
    ids = encoders.tokenize(tokenizer, ["a red circle", ""], 16)
    context = encoders.encode_tokens(text_encoder, ids, tokenizer.pad_token_id)
    assert context.shape == (2, 16, 32)
    torch.testing.assert_close(context, text_encoder(ids).last_hidden_state)
    context.square().sum().backward()
    assert text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_both_towers_of_a_clip_give_the_text_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER | {"image_size": 16, "patch_size": 8})).eval()
    clip.save_pretrained(tmp_path)
    ids = torch.arange(16).view(2, 8)
    loaded = encoders.encode_tokens(encoders.load_transformers_encoder(str(tmp_path)), ids, 0)
    torch.testing.assert_close(loaded, clip.text_model(ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_encoders_do_not_look_at_padding(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "bert":
        BertModel(BertConfig(vocab_size=50, **TOWER)).save_pretrained(tmp_path)
    else:
        T5Model(T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)).save_pretrained(
            tmp_path
        )
    text_encoder = encoders.load_transformers_encoder(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 1]])
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    alone, beside_padding = (encoders.encode_tokens(text_encoder, x, 0) for x in (ids, padded))
    assert beside_padding.shape == (1, 8, 16)
    torch.testing.assert_close(beside_padding[:, :4], alone)


def test_how_many_tokens_text_encoders_read() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertModel(BertConfig(**sizes, max_position_embeddings=20))
    roberta = RobertaModel(RobertaConfig(**sizes, max_position_embeddings=20))
    t5 = T5EncoderModel(T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    assert encoders.num_positions(bert) == 20
    assert encoders.num_positions(t5) is None
    assert encoders.num_positions(roberta) == 18
    roberta(input_ids=torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 19), 5))
