"""A VAE under each of its names is the same VAE; diffusers' own converter agrees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from tests.port import same
from uvit.errors import UserError
from uvit.weights.report import Report
from uvit.weights.vae import ldm_name, non_default_vae_config, to_ldm, transpose_vae, vae_from_tensors

PATH = Path("autoencoder_kl.pth")
CONFIG = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(**CONFIG).eval()


def test_first_names(vae: Any) -> None:
    first = to_ldm(vae.state_dict(), 3)
    assert len(first) == len(vae.state_dict())
    assert first["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert same(convert_ldm_vae_checkpoint(dict(first), CONFIG), vae.state_dict())
    report = Report()
    again = vae_from_tensors(first, PATH, None, False, True, report)
    assert same(again.state_dict(), vae.state_dict())
    assert again.config["block_out_channels"] == [32, 64, 64] and again.config["layers_per_block"] == 2
    assert len(report.defaulted) == 1
    assert report.defaulted[0].startswith("VAE: norm_num_groups 32, scaling_factor 0.18215, no shift_factor, as of")
    assert report.dropped == []


def test_names_as_stable_diffusion_has_them() -> None:
    names = {
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.weight": "encoder.down.0.downsample.conv.weight",
        "encoder.mid_block.resnets.1.norm2.bias": "encoder.mid.block_2.norm2.bias",
        "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
        "decoder.mid_block.attentions.0.group_norm.bias": "decoder.mid.attn_1.norm.bias",
        "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
        "quant_conv.weight": "quant_conv.weight",
    }
    assert {name: ldm_name(name, 4) for name in names} == names


def test_the_ports_layout_and_diffusers_older_names(vae: Any) -> None:
    paddle = transpose_vae(vae.state_dict())
    assert not same(paddle, vae.state_dict())
    assert same(vae_from_tensors(paddle, PATH, CONFIG, True, False, Report()).state_dict(), vae.state_dict())
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in vae.state_dict().items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = value
    assert same(vae_from_tensors(weights, PATH, None, False, False, Report()).state_dict(), vae.state_dict())


def test_no_attention_in_the_middle() -> None:
    vae: Any = AutoencoderKL(**CONFIG, mid_block_add_attention=False)
    for ldm, weights in ((False, vae.state_dict()), (True, to_ldm(vae.state_dict(), 3))):
        assert same(vae_from_tensors(weights, PATH, None, False, ldm, Report()).state_dict(), vae.state_dict())


def test_what_arrays_do_not_tell(vae: Any) -> None:
    assert non_default_vae_config(vae) == []
    other = AutoencoderKL(**CONFIG, norm_num_groups=8, act_fn="mish", shift_factor=0.1)
    assert non_default_vae_config(other) == [
        "norm_num_groups 8 (where 32 is assumed)",
        "act_fn mish (where silu is assumed)",
        "shift_factor 0.1 (where None is assumed)",
    ]


def test_what_does_not_fit(vae: Any) -> None:
    weights = to_ldm(vae.state_dict(), 3)
    name = "decoder.up.2.block.0.conv1.weight"
    with pytest.raises(UserError, match=r"is not complete, 1 arrays of the VAE are missing"):
        vae_from_tensors(
            {key: value for key, value in weights.items() if key != name}, PATH, None, False, True, Report()
        )
    with pytest.raises(UserError, match=r"is not complete, 'encoder.conv_in.weight' is missing"):
        vae_from_tensors({name: weights[name]}, PATH, None, False, True, Report())
    with pytest.raises(UserError, match=r"of widths \[24\], .*; put its config.json beside it"):
        narrow = weights | {"encoder.down.0.block.0.conv1.weight": torch.zeros(24, 24, 3, 3)}
        vae_from_tensors({k: v for k, v in narrow.items() if ".down.1" not in k}, PATH, None, False, True, Report())
