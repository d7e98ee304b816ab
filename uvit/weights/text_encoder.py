"""A CLIP text encoder's weights from elsewhere: the Paddle port's names and layout, and back again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from uvit.errors import UserError
from uvit.weights.encoders import quiet
from uvit.weights.report import Report
from uvit.weights.unet import fill

PREFIX = "text_model."  # transformers 5 writes the names without it; all others have it
HEAD_DIM = 64  # of every CLIP text encoder

# transformers' name of a part, and PaddleNLP's, which the port's trainer saves.
_PADDLENLP = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.": "positional_embedding.",
    "encoder.layers.": "transformer.layers.",
    "final_layer_norm.": "ln_final.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}
_NOT_WEIGHTS = ("embeddings.position_ids", "text_projection.weight", "position_ids", "causal_mask")


def our_name(name: str) -> str:
    """The name in transformers 5, without its prefix, of a name in transformers or PaddleNLP."""
    name = name.removeprefix(PREFIX)
    for ours, theirs in _PADDLENLP.items():
        if theirs.startswith("."):
            name = name.replace(theirs, ours)
        elif name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name


def paddlenlp_name(name: str) -> str:
    """The other way round."""
    for ours, theirs in _PADDLENLP.items():
        name = name.replace(ours, theirs)
    return PREFIX + name


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and (".self_attn." in name or ".mlp." in name)


def transpose_text_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Between Paddle's layout and ours; embeddings are the same in both."""
    return {name: value.t().contiguous() if is_linear(name) else value for name, value in tensors.items()}


def text_encoder_from_tensors(
    tensors: Mapping[str, Tensor], path: Path, known: Mapping[str, Any] | None, report: Report
) -> CLIPTextModel:
    """The encoder of tensors under either name and in either layout, float32; `known`: its config."""
    weights = {our_name(name): value for name, value in tensors.items()}
    left = [name for name in weights if name in _NOT_WEIGHTS]
    if left:
        report.left.append(f"text encoder: {', '.join(left)}, which the context does not need")
        weights = {name: value for name, value in weights.items() if name not in left}
    fc1 = "encoder.layers.0.mlp.fc1.weight"
    try:
        vocab_size, dim = weights["embeddings.token_embedding.weight"].shape
        positions = weights["embeddings.position_embedding.weight"].shape[0]
        inner = weights[fc1.replace("weight", "bias")].shape[0]
        paddle = weights[fc1].shape == (dim, inner) and dim != inner
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: is not whole, {error} is missing from a text encoder; get it again") from None
    if paddle:
        weights = transpose_text_encoder(weights)
        linear = sum(is_linear(name) for name in weights)
        report.converted.append(f"text encoder: {linear} Linear weights from (in, out)")
    if known is None:
        if dim % HEAD_DIM:
            raise UserError(f"{path}: is a text encoder of width {dim}; its config.json must lie beside it")
        layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
        known = {
            "vocab_size": vocab_size,
            "hidden_size": dim,
            "intermediate_size": inner,
            "num_hidden_layers": len(layers),
            "num_attention_heads": dim // HEAD_DIM,
            "max_position_embeddings": positions,
            "hidden_act": "quick_gelu",
        }
        report.defaulted.append(
            f"text encoder: {dim // HEAD_DIM} attention heads of {HEAD_DIM}, quick_gelu, as in CLIP"
        )
    settings = {key: value for key, value in known.items() if not key.startswith(("_", "paddle")) and key != "dtype"}
    try:
        with quiet():
            encoder = CLIPTextModel(CLIPTextConfig(**settings))
    except Exception as error:  # whatever a wrong value leads to
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the config.json beside it describes no CLIP text encoder ({reason})") from None
    fill(encoder, weights, path, "text encoder", report)
    return encoder


def non_default_text_config(encoder: CLIPTextModel) -> list[str]:
    """What its arrays do not tell, where it is not what CLIP has."""
    config = encoder.config
    usual = {"num_attention_heads": config.hidden_size // HEAD_DIM, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    wrong = [key for key, value in usual.items() if getattr(config, key) != value]
    return [f"{key} {getattr(config, key)} (where {usual[key]} is assumed)" for key in wrong]
