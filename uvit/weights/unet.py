"""Weights of a U-ViT: their layout, and the model that they fit.

The official U-ViT code and PaddleMIX use the same names as `UViTT2IModel`. Paddle stores every Linear weight as
(in, out), and the LayerNorms of the PaddleMIX trainer have no weight and bias.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit.config.model import KINDS, model_config_names, resolve_model_config
from uvit.errors import UserError, differences
from uvit.model import UViTT2IModel
from uvit.weights.encoders import check_finite
from uvit.weights.report import Report, shorten

TEXT_TOKENS = 77  # CLIP's


def is_norm(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in ("norm", "norm1", "norm2")


def is_paddle(tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether Linear weights are (in, out). Raises UserError where some are and others are not."""
    dim = tensors["pos_embed"].shape[-1] if "pos_embed" in tensors else 0
    examples: dict[bool, str] = {}  # {whether (in, out): the name of a weight}
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[0] != value.shape[1] and name.startswith(("in_", "mid_", "out_")):
            widens = "fc1" in name or "qkv" in name  # from D; the other weights narrow to D
            if dim in value.shape:
                examples.setdefault((value.shape[0] == dim) == widens, name)
    if len(examples) == 2:
        raise UserError(f"{path}: mixes layouts: {examples[True]} is (in, out) and {examples[False]} is (out, in)")
    if not examples:
        raise UserError(f"{path}: is not complete, the blocks of the U-ViT are missing; get it again")
    return next(iter(examples))


def transpose_unet(tensors: Mapping[str, Tensor], paddle: bool = True) -> dict[str, Tensor]:
    """Between (out, in) and Paddle's (in, out), either way. Every 2-D array of a U-ViT is a Linear weight."""
    if not paddle:
        return dict(tensors)
    return {name: value.t().contiguous() if value.ndim == 2 else value for name, value in tensors.items()}


def unet_config(
    tensors: Mapping[str, Tensor], path: Path, config: Mapping[str, Any], report: Report | None = None
) -> dict[str, Any]:
    """All arguments of UViTT2IModel for tensors in the (out, in) layout.

    The shapes tell all but the attention heads and the number of text tokens. These are taken from `config`, else from
    the shipped config of that width. Raises UserError where `config` contradicts the shapes, or nothing tells them.
    """
    if not any(name.startswith("context_embed.") for name in tensors):
        raise UserError(
            f"{path}: is a U-ViT that reads no text (it has no context_embed), like those of CIFAR-10 and CelebA; only "
            "text-to-image U-ViTs can be converted"
        )
    try:
        channels, patch = tensors["patch_embed.proj.weight"].shape[1], tensors["patch_embed.proj.weight"].shape[2]
        dim, clip_dim = tensors["context_embed.weight"].shape
        num_blocks = len({name.split(".")[1] for name in tensors if name.startswith("in_blocks.")})
        found: dict[str, Any] = {
            "patch_size": patch,
            "in_channels": channels,
            "num_layers": 2 * num_blocks,
            "mlp_ratio": tensors["mid_block.mlp.fc1.weight"].shape[0] / dim,
            "qkv_bias": "mid_block.attn.qkv.bias" in tensors,
            "clip_dim": clip_dim,
            "conv": "final_layer.weight" in tensors,
            "bottleneck_dim": tensors["patch_embed.expand.weight"].shape[1]
            if "patch_embed.expand.weight" in tensors
            else None,
        }
        num_tokens = tensors["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is not complete, {error} is missing from the U-ViT; get it again") from None
    said = {key: config[key] for key in found if key in config}
    if wrong := differences(said, {key: found[key] for key in said}, ("the config says", "the file has")):
        raise UserError(f"{path}: does not fit its config; pass its own as --uvit_config_file", list(wrong.values()))
    shipped = [resolve_model_config(name) for name in model_config_names()]
    heads = {(c["num_attention_heads"], c["attention_head_dim"]) for c in shipped if _dim(c) == dim}
    if _dim(config):
        heads = {(config["num_attention_heads"], config["attention_head_dim"])}
    elif heads and report is not None:
        report.defaulted.append(f"{_heads(*next(iter(heads)))}, as in the shipped configs of width {dim}")
    if len(heads) != 1 or math.prod(next(iter(heads))) != dim:
        problem = (
            f"the config says {_heads(*next(iter(heads)))}" if _dim(config) else "the shapes do not tell its heads"
        )
        raise UserError(f"{path}: is a U-ViT of width {dim}, and {problem}; pass its config as --uvit_config_file")
    found["num_attention_heads"], found["attention_head_dim"] = next(iter(heads))
    texts = [c["num_text_tokens"] for c in shipped if _num_tokens(c) == num_tokens and _agree(c, found)]
    usual = TEXT_TOKENS if TEXT_TOKENS in texts or not texts else texts[0]
    found["num_text_tokens"] = config.get("num_text_tokens", usual)
    grid = num_tokens - 1 - found["num_text_tokens"]
    side = math.isqrt(max(grid, 0))
    size = config.get("sample_size", side * patch)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if grid <= 0 or (height // patch) * (width // patch) != grid:
        raise UserError(
            f"{path}: has {num_tokens} positions, and not 1 for time, {found['num_text_tokens']} for text and "
            f"{height // patch}x{width // patch} for patches; pass its config as --uvit_config_file"
        )
    if "num_text_tokens" not in config and report is not None:
        report.defaulted.append(f"num_text_tokens {usual}, so sample_size {side * patch}")
    found["mlp_ratio"] = (
        int(found["mlp_ratio"]) if found["mlp_ratio"] == int(found["mlp_ratio"]) else found["mlp_ratio"]
    )
    if found["bottleneck_dim"] is None:
        del found["bottleneck_dim"]
    found["sample_size"] = size
    return {key: found[key] for key in KINDS if key in found}


def _dim(config: Mapping[str, Any]) -> int:
    return config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)


def _num_tokens(config: Mapping[str, Any]) -> int:
    return 1 + config["num_text_tokens"] + (config["sample_size"] // config["patch_size"]) ** 2


def _agree(config: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(config.get(key) == value for key, value in found.items())


def _heads(number: int, width: int) -> str:
    return f"{number} attention heads of {width}"


def unet_from_tensors(
    tensors: Mapping[str, Tensor], path: Path, config: Mapping[str, Any], report: Report
) -> UViTT2IModel:
    """The U-ViT of tensors in either layout, float32.

    LayerNorms are 1 and 0 if the file has none. Raises UserError where anything else is missing, unexpected or of
    another shape.
    """
    paddle = is_paddle(tensors, path)
    weights = transpose_unet(tensors, paddle)
    if paddle:
        report.converted.append(f"U-ViT: {sum(v.ndim == 2 for v in weights.values())} Linear weights from (in, out)")
    unet = UViTT2IModel(**unet_config(weights, path, config, report))
    wanted = unet.state_dict()
    norms = [name for name in wanted if is_norm(name)]
    if not any(name in weights for name in norms):
        weights |= {name: wanted[name] for name in norms}  # 1 and 0, as initialised
        report.defaulted.append(f"{len(norms)} LayerNorm weights and biases are 1 and 0, as the file has none")
    fill(unet, weights, path, "U-ViT", report)
    return unet


def fill(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path, what: str, report: Report) -> None:
    """Load weights into a module. Raises UserError where they do not fit exactly."""
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(
            f"{path}: is not complete, {len(missing)} arrays of the {what} are missing ({shorten(missing)})"
        )
    extra = sorted(set(weights) - set(wanted))
    if extra:
        raise UserError(f"{path}: holds {len(extra)} arrays that the {what} does not have ({shorten(extra)})")
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)}, and the {what} needs {tuple(wanted[name].shape)}"
            raise UserError(f"{path}: {name} has shape {shapes}")
    check_finite(weights, path)
    others = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()} - {"float32"})
    if others:
        report.converted.append(f"{what}: {', '.join(others)} to float32")
    module.load_state_dict(dict(weights))
    module.eval().requires_grad_(False)
