"""Weights of a U-ViT: their layout, and the model that they fit, published or modern.

The official U-ViT code and PaddleMIX use the same names as `UViTT2IModel`. Paddle stores every Linear weight as
(in, out), and the LayerNorms of the PaddleMIX trainer have no weight and bias.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit.config.model import CLASS_KEY, FLAG, MODERN, kinds_of, model_config_names, resolve_model_config
from uvit.errors import UserError, differences
from uvit.model import UViTT2IModel
from uvit.modern_model import ModernUViTT2IModel
from uvit.weights.encoders import check_finite
from uvit.weights.report import Report, shorten

TEXT_TOKENS = 77  # CLIP's
MODERN_NAME = "mid_block.attn.q_norm.weight"  # no published U-ViT has it


def unet_class(config: Mapping[str, Any]) -> type[UViTT2IModel]:
    """The class that a config is of: the published U-ViT, unless it names the modern one."""
    return ModernUViTT2IModel if config.get(CLASS_KEY) == MODERN else UViTT2IModel


def new_unet(config: Mapping[str, Any], **conventions: Any) -> UViTT2IModel:
    """A U-ViT with new weights. `config`: as of `resolve_model_config`. Raises UserError if its sizes do not fit."""
    arguments = {key: value for key, value in config.items() if key != CLASS_KEY}
    try:
        return unet_class(config)(**arguments, **conventions)
    except ValueError as error:
        raise UserError(f"{FLAG}: {error}") from None


def model_config(unet: Any) -> dict[str, Any]:
    """The sizes of a U-ViT, as of `resolve_model_config`: without the conventions and what diffusers adds."""
    named = {CLASS_KEY: MODERN} if isinstance(unet, ModernUViTT2IModel) else {}
    return {**named, **{key: unet.config[key] for key in kinds_of(named) if unet.config[key] is not None}}


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
    """All arguments of the U-ViT, as of `resolve_model_config`, for tensors in the (out, in) layout.

    The shapes tell all but the number of text tokens, and the attention heads of the published model, or how the
    modern one adds its skips. These are taken from `config`, else from the shipped configs of that width. Raises
    UserError where `config` contradicts the shapes, or nothing tells them.
    """
    if not any(name.startswith("context_embed.") for name in tensors):
        raise UserError(
            f"{path}: is a U-ViT that reads no text (it has no context_embed), like those of CIFAR-10 and CelebA; only "
            "text-to-image U-ViTs can be converted"
        )
    is_modern = MODERN_NAME in tensors
    found: dict[str, Any] = {CLASS_KEY: MODERN} if is_modern else {}
    if config and unet_class(config) is not unet_class(found):
        other = f"is of {unet_class(config).__name__}, and the file has a {unet_class(found).__name__}"
        raise UserError(f"{path}: does not fit its config, which {other}; pass its own as --uvit_config_file")
    try:
        found |= _sizes_from_shapes(tensors)
        found |= _modern_sizes(tensors, config, path) if is_modern else _published_sizes(tensors)
        dim, num_tokens = tensors["context_embed.weight"].shape[0], tensors["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is not complete, {error} is missing from the U-ViT; get it again") from None
    said = {key: config[key] for key in found if key in config}
    if isinstance(said.get("num_layers"), int):
        said["num_layers"] = said["num_layers"] // 2 * 2  # as many as the model builds, besides the middle one
    if wrong := differences(said, {key: found[key] for key in said}, ("the config says", "the file has")):
        raise UserError(f"{path}: does not fit its config; pass its own as --uvit_config_file", list(wrong.values()))
    shipped = [c for c in map(resolve_model_config, model_config_names()) if unet_class(c) is unet_class(found)]
    if not is_modern:
        found |= _published_heads(shipped, dim, config, path, report)
    if found["bottleneck_dim"] is None:
        del found["bottleneck_dim"]
    found |= _grid_and_text(found, shipped, num_tokens, config, path, report)
    return {key: found[key] for key in (CLASS_KEY, *kinds_of(found)) if key in found}


def _sizes_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Those of either model. Raises KeyError, ValueError or IndexError if tensors are missing."""
    bottleneck = tensors.get("patch_embed.expand.weight")
    return {
        "patch_size": tensors["patch_embed.proj.weight"].shape[2],
        "in_channels": tensors["patch_embed.proj.weight"].shape[1],
        "num_layers": 2 * len({name.split(".")[1] for name in tensors if name.startswith("in_blocks.")}),
        "clip_dim": tensors["context_embed.weight"].shape[1],
        "conv": "final_layer.weight" in tensors,
        "bottleneck_dim": None if bottleneck is None else bottleneck.shape[1],
    }


def _published_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    ratio = tensors["mid_block.mlp.fc1.weight"].shape[0] / tensors["context_embed.weight"].shape[0]
    return {
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "qkv_bias": "mid_block.attn.qkv.bias" in tensors,
    }


def _modern_sizes(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    head_dim = tensors[MODERN_NAME].shape[0]
    skip = "concat" if any("skip_linear" in name for name in tensors) else config.get("skip")
    if skip is None:
        raise UserError(
            f"{path}: the shapes do not tell whether its skips are added or left out; pass its config as "
            "--uvit_config_file"
        )
    return {
        "num_attention_heads": tensors["context_embed.weight"].shape[0] // head_dim,
        "attention_head_dim": head_dim,
        "skip": skip,
    }


def _published_heads(
    shipped: list[dict[str, Any]], dim: int, config: Mapping[str, Any], path: Path, report: Report | None
) -> dict[str, Any]:
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
    return dict(zip(("num_attention_heads", "attention_head_dim"), next(iter(heads)), strict=True))


def _grid_and_text(
    found: Mapping[str, Any],
    shipped: list[dict[str, Any]],
    num_tokens: int,
    config: Mapping[str, Any],
    path: Path,
    report: Report | None,
) -> dict[str, Any]:
    """How many of the positions are for text, and the size of the grid of the others."""
    patch = found["patch_size"]
    texts = [c["num_text_tokens"] for c in shipped if _num_tokens(c) == num_tokens and _agree(c, found)]
    usual = TEXT_TOKENS if TEXT_TOKENS in texts or not texts else texts[0]
    num_text_tokens = config.get("num_text_tokens", usual)
    grid = num_tokens - 1 - num_text_tokens
    side = math.isqrt(max(grid, 0))
    size = config.get("sample_size", side * patch)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if grid <= 0 or (height // patch) * (width // patch) != grid:
        raise UserError(
            f"{path}: has {num_tokens} positions, and not 1 for time, {num_text_tokens} for text and "
            f"{height // patch}x{width // patch} for patches; pass its config as --uvit_config_file"
        )
    if "num_text_tokens" not in config and report is not None:
        report.defaulted.append(f"num_text_tokens {usual}, so sample_size {side * patch}")
    return {"num_text_tokens": num_text_tokens, "sample_size": size}


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
    unet = new_unet(unet_config(weights, path, config, report))
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
