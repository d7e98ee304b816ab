"""A U-ViT's weights from elsewhere: their layout, the model that they fit, and back again.

The official code and the Paddle port use the names that ours has; Paddle stores every Linear weight as (in, out), and
the port's trainer has LayerNorms without weight and bias.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit.config.model import KINDS, check_neutral, model_config_names, resolve_model_config
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.weights.encoders import check_finite
from uvit.weights.report import Report, shorten

TEXT_TOKENS = 77  # CLIP's


def is_norm(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in ("norm", "norm1", "norm2")


def is_paddle(tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether Linear weights are (in, out). Raises UserError where some are and others are not."""
    dim = tensors["pos_embed"].shape[-1] if "pos_embed" in tensors else 0
    votes: dict[bool, str] = {}
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[0] != value.shape[1] and name.startswith(("in_", "mid_", "out_")):
            into = "fc1" in name or "qkv" in name  # D -> more; the others: more -> D
            if dim in value.shape:
                votes.setdefault((value.shape[0] == dim) == into, name)
    if len(votes) == 2:
        raise UserError(f"{path}: mixes layouts: {votes[True]} is (in, out) and {votes[False]} is (out, in)")
    if not votes:
        raise UserError(f"{path}: is not whole, a U-ViT's blocks are missing; get it again")
    return next(iter(votes))


def transpose_unet(tensors: Mapping[str, Tensor], paddle: bool = True) -> dict[str, Tensor]:
    """Between the layouts; every 2-D array of a U-ViT is a Linear weight."""
    if not paddle:
        return dict(tensors)
    return {name: value.t().contiguous() if value.ndim == 2 else value for name, value in tensors.items()}


def known_config(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config of ours, the official code's or the port's -> the arguments of UViTT2IModel that it names."""
    check_neutral(content, path)
    known = {key: value for key, value in content.items() if key in KINDS}
    for key, value in known.items():
        sizes = value if isinstance(value, list) else [value]
        wrong = isinstance(value, list) and len(value) != 2
        if (
            wrong
            or type(value) not in KINDS[key]
            or not all(isinstance(size, (int, float)) and size >= 0 for size in sizes)
        ):
            raise UserError(f"{path}: {key} is {value!r}, which is no {' or '.join(k.__name__ for k in KINDS[key])}")
    return known


def unet_config(
    tensors: Mapping[str, Tensor], path: Path, known: Mapping[str, Any], report: Report | None = None
) -> dict[str, Any]:
    """The arguments of UViTT2IModel for tensors in our layout.

    Shapes tell all but the heads and how many tokens are text's: those are taken from `known`, else from the shipped
    config of that width. Raises UserError where `known` contradicts the shapes, or nothing tells.
    """
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
        }
        num_tokens = tensors["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is not whole, {error} is missing from a U-ViT; get it again") from None
    for key, value in found.items():
        if key in known and known[key] != value:
            raise UserError(f"{path}: has {key} {value}, and the config says {known[key]}")
    shipped = [resolve_model_config(name) for name in model_config_names()]
    heads = {(c["num_attention_heads"], c["attention_head_dim"]) for c in shipped if _dim(c) == dim}
    if _dim(known):
        heads = {(known["num_attention_heads"], known["attention_head_dim"])}
    elif heads and report is not None:
        report.defaulted.append(f"{_heads(*next(iter(heads)))}, as in the shipped configs of width {dim}")
    if len(heads) != 1 or math.prod(next(iter(heads))) != dim:
        said = f"the config says {_heads(*next(iter(heads)))}" if _dim(known) else "shapes do not tell the heads"
        raise UserError(f"{path}: is a U-ViT of width {dim}, and {said}; name its config with --uvit_config_file")
    found["num_attention_heads"], found["attention_head_dim"] = next(iter(heads))
    texts = [c["num_text_tokens"] for c in shipped if _num_tokens(c) == num_tokens and _agree(c, found)]
    usual = TEXT_TOKENS if TEXT_TOKENS in texts or not texts else texts[0]
    found["num_text_tokens"] = known.get("num_text_tokens", usual)
    grid = num_tokens - 1 - found["num_text_tokens"]
    side = math.isqrt(max(grid, 0))
    size = known.get("sample_size", side * patch)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if grid <= 0 or (height // patch) * (width // patch) != grid:
        raise UserError(
            f"{path}: has {num_tokens} positions, which are not one for time, {found['num_text_tokens']} for text and "
            f"{height // patch}x{width // patch} for patches; name its config with --uvit_config_file"
        )
    if "num_text_tokens" not in known and report is not None:
        report.defaulted.append(f"num_text_tokens {usual}, so sample_size {side * patch}")
    found["mlp_ratio"] = (
        int(found["mlp_ratio"]) if found["mlp_ratio"] == int(found["mlp_ratio"]) else found["mlp_ratio"]
    )
    return {key: size if key == "sample_size" else found[key] for key in KINDS}


def _dim(config: Mapping[str, Any]) -> int:
    return config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)


def _num_tokens(config: Mapping[str, Any]) -> int:
    return 1 + config["num_text_tokens"] + (config["sample_size"] // config["patch_size"]) ** 2


def _agree(config: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(config[key] == value for key, value in found.items())


def _heads(number: int, width: int) -> str:
    return f"{number} attention heads of {width}"


def unet_from_tensors(
    tensors: Mapping[str, Tensor], path: Path, known: Mapping[str, Any], report: Report
) -> UViTT2IModel:
    """The model of a U-ViT's tensors in either layout, float32.

    LayerNorms are 1 and 0 where the file has none at all. Raises UserError where anything else is missing, too much or
    of another shape.
    """
    paddle = is_paddle(tensors, path)
    weights = transpose_unet(tensors, paddle)
    if paddle:
        report.converted.append(f"U-ViT: {sum(v.ndim == 2 for v in weights.values())} Linear weights from (in, out)")
    unet = UViTT2IModel(**unet_config(weights, path, known, report))
    wanted = unet.state_dict()
    norms = [name for name in wanted if is_norm(name)]
    if not any(name in weights for name in norms):
        weights |= {name: wanted[name] for name in norms}  # as they are built: 1 and 0
        report.defaulted.append(f"{len(norms)} LayerNorm weights and biases, at 1 and 0: the file's network has none")
    fill(unet, weights, path, "U-ViT", report)
    return unet


def fill(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path, what: str, report: Report) -> None:
    """Load weights that must fit exactly. Raises UserError where they do not."""
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(f"{path}: is not whole, {len(missing)} arrays of a {what} are missing ({shorten(missing)})")
    extra = sorted(set(weights) - set(wanted))
    if extra:
        raise UserError(f"{path}: holds {len(extra)} arrays that are no {what}'s ({shorten(extra)})")
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)}, where {tuple(wanted[name].shape)} is needed"
            raise UserError(f"{path}: {name} has shape {shapes}")
    check_finite(weights, path)
    others = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()} - {"float32"})
    if others:
        report.converted.append(f"{what}: {', '.join(others)} to float32")
    module.load_state_dict(dict(weights))
    module.eval().requires_grad_(False)
