"""Weights of a VAE: between PaddleMIX's layout, diffusers' old names and the original (LDM) names, and diffusers' own.

The VAE of Stable Diffusion (`autoencoder_kl.pth` in the official U-ViT code) was published under other names than in
diffusers, and with attention made of 1x1 convolutions. Those are the LDM names here, for latent diffusion models.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from uvit.errors import UserError
from uvit.weights.report import Report
from uvit.weights.unet import fill

NORM_GROUPS = 32
# The settings of Stable Diffusion's VAE, which other programs assume. Of those that arrays do not tell, the values that
# are assumed here without a config.
_ASSUMED = {
    "norm_num_groups": NORM_GROUPS,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def ldm_name(name: str, num_blocks: int) -> str:
    """The name of an AutoencoderKL's weight in diffusers -> its LDM name."""

    def up(found: re.Match[str]) -> str:
        return f"decoder.up.{num_blocks - 1 - int(found[1])}."  # LDM counts from the image, diffusers from the latents

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", up, name)
    name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", name)
    name = re.sub(r"\.resnets\.", ".block.", name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
    name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
    for new, ldm in _ATTENTION.items():
        name = name.replace(f".mid_block.attentions.0.{new}.", f".mid.attn_1.{ldm}.")
    return name


def is_attention_linear(name: str) -> bool:
    return ".attentions." in name and name.endswith(".weight") and ".group_norm." not in name


def from_ldm(tensors: Mapping[str, Tensor], names: list[str], num_blocks: int) -> dict[str, Tensor]:
    """LDM names -> the `names` of diffusers; unknown names stay."""
    renamed = {ldm_name(name, num_blocks): name for name in names}
    found = {renamed.get(name, name): value for name, value in tensors.items()}
    return {
        name: value[:, :, 0, 0] if is_attention_linear(name) and value.ndim == 4 else value
        for name, value in found.items()
    }


def to_ldm(tensors: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    return {
        ldm_name(name, num_blocks): value[:, :, None, None] if is_attention_linear(name) else value
        for name, value in tensors.items()
    }


def transpose_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Between the (out, in) layout and Paddle's (in, out), either way."""
    return {name: value.t().contiguous() if is_attention_linear(name) else value for name, value in tensors.items()}


def vae_from_tensors(
    tensors: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] | None, paddle: bool, ldm: bool, report: Report
) -> AutoencoderKL:
    """The VAE of tensors under any of the names, float32.

    config: None: the shapes tell it. paddle: whether Linear weights are (in, out). ldm: whether the names are LDM's.
    """
    tensors = {
        re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{_OLDER[m[1]]}.", n): v for n, v in tensors.items()
    }
    if config is None:
        config = vae_config(tensors, path, ldm, report)
    arguments = set(inspect.signature(AutoencoderKL.__init__).parameters)
    try:
        vae = AutoencoderKL(**{key: value for key, value in config.items() if key in arguments})
    except Exception as error:  # a wrong value raises errors of any type
        raise UserError(f"{path}: the config.json beside it is not of an AutoencoderKL ({error})") from None
    if ldm:
        tensors = from_ldm(tensors, list(vae.state_dict()), len(vae.config["block_out_channels"]))
        report.converted.append(f"VAE: {len(tensors)} arrays renamed from LDM to diffusers")
    elif paddle:
        tensors = transpose_vae(tensors)
        linear = sum(is_attention_linear(name) for name in tensors)
        report.converted.append(f"VAE: {linear} Linear weights from (in, out)")
    fill(vae, tensors, path, "VAE", report)
    return vae


def vae_config(tensors: Mapping[str, Tensor], path: Path, ldm: bool, report: Report) -> dict[str, Any]:
    """An AutoencoderKL's config from shapes. They do not tell the number of norm groups, which is assumed to be 32."""
    block = "encoder.down.{}.block.{}.conv1.weight" if ldm else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    channels: list[int] = []
    layers = 0
    while (first := tensors.get(block.format(len(channels), 0))) is not None:
        channels.append(first.shape[0])
    while block.format(0, layers) in tensors:
        layers += 1
    try:
        in_channels, latent_channels = (
            tensors["encoder.conv_in.weight"].shape[1],
            tensors["decoder.conv_in.weight"].shape[1],
        )
        out_channels = tensors["decoder.conv_out.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError(f"{path}: is not complete, {error} is missing from the VAE; get it again") from None
    if not channels or any(width % NORM_GROUPS for width in channels):
        raise UserError(
            f"{path}: is a VAE of widths {channels}, which are not multiples of {NORM_GROUPS}; put its config.json "
            "beside it"
        )
    report.defaulted.append(
        f"VAE: norm_num_groups {NORM_GROUPS}, scaling_factor 0.18215, no shift_factor, as of Stable Diffusion's; its "
        "config.json beside the weights changes them"
    )
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "norm_num_groups": NORM_GROUPS,
        "mid_block_add_attention": any(".mid.attn_1." in n or ".mid_block.attentions." in n for n in tensors),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def non_default_vae_config(vae: Any) -> list[str]:
    """The settings that differ from what other programs assume: norm_num_groups 8, for example."""
    config = vae.config
    other = [key for key, value in _ASSUMED.items() if config.get(key, value) != value]
    lines = [f"{key} {config[key]} (where {_ASSUMED[key]} is assumed)" for key in other]
    usual = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    return lines + [f"{key} other than {kind}" for key, kind in usual.items() if set(config[key]) != {kind}]
