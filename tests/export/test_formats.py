"""What is written in another format comes back bit for bit, and what a format cannot say is refused or reported."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.port import PORT_FOLDER, TINY, same, tiny_unet
from uvit.errors import UserError
from uvit.export.formats import save_pth, write_official, write_paddle, write_paddlemix, write_trainer
from uvit.extract.tokenizer import train_tokenizer
from uvit.model import UViTT2IModel
from uvit.weights.components import Components, Conventions, read_components
from uvit.weights.files import read_weights
from uvit.weights.pdparams import read_pdparams
from uvit.weights.unet import is_norm, transpose_unet

PARTS = {"unet": "diffusion_paddle_model", "vqvae": "diffusion_paddle_model", "text_encoder": "model"}


@pytest.mark.parametrize("container", ["safetensors", "pdparams"])
def test_the_ports_folder_there_and_back(container: Any, tmp_path: Path) -> None:
    write_paddlemix(read_components(PORT_FOLDER), tmp_path, container)
    for name, stem in PARTS.items():
        file = f"{stem}.safetensors" if container == "safetensors" else "model_state.pdparams"
        wanted = read_weights(PORT_FOLDER / name / f"{stem}.safetensors").tensors
        assert same(read_weights(tmp_path / name / file).tensors, wanted), name
        ours, theirs = (json.loads((folder / name / "config.json").read_text()) for folder in (tmp_path, PORT_FOLDER))
        assert {key: theirs[key] for key in ours} == ours and set(theirs) - set(ours) <= {
            "_name_or_path", "down_block_out_channels", "up_block_out_channels", "paddlenlp_version", "return_dict",
        }, name  # fmt: skip
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((PORT_FOLDER / name).read_text()), name
    assert (tmp_path / "tokenizer/merges.txt").read_text() == (PORT_FOLDER / "tokenizer/merges.txt").read_text()
    if container == "safetensors":
        for name, stem in PARTS.items():
            said = []
            for folder in (tmp_path, PORT_FOLDER):
                with safe_open(folder / name / f"{stem}.safetensors", "np") as file:
                    said.append(file.metadata())
            assert said[0] == said[1], name


def test_the_official_code_there_and_back(tmp_path: Path) -> None:
    components = Components(
        unet=tiny_unet(1), raw_unet=tiny_unet(2).state_dict(), vqvae=read_components(PORT_FOLDER).vqvae
    )
    write_official(components, tmp_path)
    ema = torch.load(tmp_path / "nnet_ema.pth", weights_only=True)  # as the official code does
    assert same(ema, tiny_unet(1).state_dict())
    assert same(torch.load(tmp_path / "nnet.pth", weights_only=True), tiny_unet(2).state_dict())
    first_stage = torch.load(tmp_path / "autoencoder_kl.pth", weights_only=True)
    assert first_stage["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert "embed_dim=32, depth=2, num_heads=2" in components.report.converted[0]
    assert (
        len(components.report.dropped) == 1
        and "vqvae: norm_num_groups 8 (where 32 is assumed)" in components.report.dropped[0]
    )
    again = read_components(tmp_path)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(again.vqvae.decode(latents).sample, components.vqvae.decode(latents).sample)
    assert same(again.unet.state_dict(), tiny_unet(1).state_dict()) and again.raw_unet is not None
    assert same(again.raw_unet, tiny_unet(2).state_dict())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk")
def test_a_file_that_the_disk_does_not_take() -> None:
    with pytest.raises(OSError, match="No space left"):
        save_pth(tiny_unet().state_dict(), Path("/dev/full"))
    gc.collect()  # torch's writer has nothing left to say


@pytest.mark.parametrize("container", ["safetensors", "pdparams"])
def test_the_paddle_u_vit_there_and_back(container: Any, tmp_path: Path) -> None:
    unet = tiny_unet(conv=False, qkv_bias=True)
    write_paddle(Components(unet=unet), tmp_path, container)
    assert json.loads((tmp_path / "config.json").read_text())["norm_type"] == "layer_norm"
    again = read_components(tmp_path).unet
    assert same(again.state_dict(), unet.state_dict()) and isinstance(again.final_layer, torch.nn.Identity)


def test_the_ports_trainer_there_and_back(tmp_path: Path) -> None:
    ema, raw = tiny_unet(1), tiny_unet(2)
    for unet in (ema, raw):
        for name, value in unet.named_parameters():
            if is_norm(name):
                value.fill_(name.endswith("weight"))
    components = Components(unet=ema, raw_unet=raw.state_dict())
    write_trainer(components, tmp_path)
    content = read_pdparams(tmp_path / "model_state.pdparams")
    assert not any("norm" in name for name in content) and content["alphas_cumprod"].shape == (1000,)
    assert torch.equal(content["model_ema.mid_blockattnqkvweight"], ema.mid_block.attn.qkv.weight.t())
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    again = read_components(tmp_path, config_file=str(tmp_path / "tiny.json"))
    assert same(again.unet.state_dict(), ema.state_dict()) and again.raw_unet is not None
    assert same(again.raw_unet, raw.state_dict())
    with pytest.raises(
        UserError, match=r"--to trainer: the PaddleMIX trainer has no .*norm1.weight.* is not all 1; use --to port"
    ):
        write_trainer(Components(unet=tiny_unet()), tmp_path)


def test_layouts_are_of_linear_weights_only() -> None:
    weights, paddle = tiny_unet().state_dict(), transpose_unet(tiny_unet().state_dict())
    for name, value in weights.items():
        assert paddle[name].shape == (value.shape[::-1] if value.ndim == 2 else value.shape), name


def test_what_readers_have_in_their_code_is_reported(tmp_path: Path) -> None:
    for name in ("official", "paddle", "trainer"):
        (tmp_path / name).mkdir()
    components = read_components(PORT_FOLDER)
    components.conventions = Conventions(0.5, prediction_type="v_prediction")
    components.scheduler_config = None
    components.report.dropped.clear()
    write_paddlemix(components, tmp_path / "port", "safetensors")
    assert components.report.dropped == [
        "latent scale 0.5: the PaddleMIX pipeline uses 0.18215; change it in its source code",
        "timesteps 1..1000: the PaddleMIX pipeline uses 0..999; change it in its source code",
    ]
    assert components.report.defaulted[-1] == "scheduler: DDIM, as in PaddleMIX's folders"
    written = json.loads((tmp_path / "port" / "scheduler" / "scheduler_config.json").read_text())
    assert written["prediction_type"] == "v_prediction" and written["steps_offset"] == 1
    official = Components(unet=tiny_unet(), conventions=components.conventions)
    write_official(official, tmp_path / "official")
    assert [line.split(":")[0] for line in official.report.dropped] == [
        "latent scale 0.5",
        "prediction type v_prediction",
    ]
    assert read_components(tmp_path / "official").conventions == components.conventions
    paddle = Components(unet=tiny_unet(), conventions=components.conventions)
    write_paddle(paddle, tmp_path / "paddle", "safetensors")
    dropped = ["latent scale 0.5", "timesteps 1..1000", "prediction type v_prediction"]
    assert [line.split(":")[0] for line in paddle.report.dropped] == dropped
    assert read_components(tmp_path / "paddle").conventions == components.conventions
    trainer = Components(unet=UViTT2IModel(**TINY), conventions=components.conventions)
    write_trainer(trainer, tmp_path / "trainer")
    assert [line.split(":")[0] for line in trainer.report.dropped] == [
        "latent scale 0.5",
        "prediction type v_prediction",
    ]
    assert read_components(tmp_path / "trainer").conventions == components.conventions


def test_encoders_that_the_port_has_not(tmp_path: Path) -> None:
    components = read_components(PORT_FOLDER)
    whole = {name: getattr(components, name) for name in ("unet", "vqvae", "text_encoder", "tokenizer")}
    with pytest.raises(UserError, match=r"--to port: needs a complete pipeline.*pass --vae_name_or_path"):
        write_paddlemix(Components(**(whole | {"vqvae": None})), tmp_path, "safetensors")
    t5 = T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(UserError, match="CLIP's text encoder, and this is a T5EncoderModel; --to paddle"):
        write_paddlemix(Components(**(whole | {"text_encoder": t5})), tmp_path, "safetensors")
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["a red circle"], 300)
    with pytest.raises(UserError, match="supports only CLIP's tokenizer"):
        write_paddlemix(Components(**(whole | {"tokenizer": tokenizer})), tmp_path, "safetensors")
    with pytest.raises(UserError, match=r"--to official: its U-ViT needs square latents, .* \(8, 12\)"):
        write_official(Components(unet=tiny_unet(sample_size=(8, 12))), tmp_path)
