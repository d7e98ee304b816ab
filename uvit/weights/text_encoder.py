"""Weights of a CLIP text encoder: between PaddleMIX's names and layout, and those of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from uvit.errors import UserError
from uvit.weights.encoders import quiet
from uvit.weights.report import Report, shorten
from uvit.weights.unet import fill

PREFIX = "text_model."  # transformers 5 writes the names without it; others write it
HEAD_DIM = 64  # of every CLIP text encoder

# Names in transformers, and in PaddleNLP, which the PaddleMIX trainer saves.
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
_NOT_OF_THE_NETWORK = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
_OTHER_TOWER = ("vision_model.", "visual_projection.", "logit_scale")  # in files of a whole CLIP


def transformers_name(name: str) -> str:
    """A name in transformers or PaddleNLP -> the name in transformers 5, without the prefix."""
    name = name.removeprefix(PREFIX)
    for new, paddlenlp in _PADDLENLP.items():
        if paddlenlp.startswith("."):
            name = name.replace(paddlenlp, new)
        elif name.startswith(paddlenlp):
            name = new + name.removeprefix(paddlenlp)
    return name


def paddlenlp_name(name: str) -> str:
    """A name in transformers 5, without the prefix -> the name in PaddleNLP."""
    for new, paddlenlp in _PADDLENLP.items():
        name = name.replace(new, paddlenlp)
    return PREFIX + name


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and (".self_attn." in name or ".mlp." in name)


def transpose_text_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Between the (out, in) layout and Paddle's (in, out), either way; embeddings are alike in both."""
    return {name: value.t().contiguous() if is_linear(name) else value for name, value in tensors.items()}


def text_encoder_from_tensors(
    tensors: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] | None, report: Report
) -> CLIPTextModel:
    """The text encoder of tensors under either names and in either layout, float32.

    config: None: the shapes tell it, and CLIP's values are taken for the rest.
    """
    weights = {transformers_name(name): value for name, value in tensors.items()}
    dropped = [name for name in weights if name in _NOT_WEIGHTS or name.startswith(_OTHER_TOWER)]
    if dropped:
        report.dropped.append(f"text encoder: {shorten(dropped)}, which text embeddings do not need")
        weights = {name: value for name, value in weights.items() if name not in dropped}
    fc1 = "encoder.layers.0.mlp.fc1.weight"
    try:
        vocab_size, dim = weights["embeddings.token_embedding.weight"].shape
        positions = weights["embeddings.position_embedding.weight"].shape[0]
        inner = weights[fc1.replace("weight", "bias")].shape[0]
        paddle = weights[fc1].shape == (dim, inner) and dim != inner
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: is not complete, {error} is missing from the text encoder; get it again") from None
    if paddle:
        weights = transpose_text_encoder(weights)
        linear = sum(is_linear(name) for name in weights)
        report.converted.append(f"text encoder: {linear} Linear weights from (in, out)")
    if config is None:
        if dim % HEAD_DIM:
            raise UserError(
                f"{path}: is a text encoder of width {dim}, which is not a multiple of {HEAD_DIM}; put its config.json "
                "beside it"
            )
        layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
        config = {
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
    ignored = ("_", "paddle")
    settings = {key: value for key, value in config.items() if not key.startswith(ignored) and key != "dtype"}
    try:
        with quiet():
            encoder = CLIPTextModel(CLIPTextConfig(**settings))
    except Exception as error:  # a wrong value raises errors of any type
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the config.json beside it is not of a CLIP text encoder ({reason})") from None
    fill(encoder, weights, path, "text encoder", report)
    return encoder


# Training one


def prepare_to_train(encoder: Any, name: str) -> Any:
    """A text encoder from `name` with gradients and without dropout, whose random numbers no checkpoint keeps.

    Raises UserError if it is not a CLIP text encoder: pipelines of trained ones hold these.
    """
    kind = encoder.config.model_type
    if not kind.startswith("clip"):
        raise UserError(
            f"--train_text_encoder: trains CLIP text encoders, and that of {name} is of the kind {kind}; leave "
            "--train_text_encoder out to train with it as it is, or name a CLIP"
        )
    encoder.config.attention_dropout = 0.0
    for module in encoder.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return encoder.requires_grad_(True)


def comparable_text_config(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a text encoder's config says of the network, the same from every version of transformers."""
    if config is None:
        return None
    whole = CLIPTextConfig(**config).to_dict()
    return {key: value for key, value in whole.items() if key not in _NOT_OF_THE_NETWORK}


def non_default_text_config(encoder: CLIPTextModel) -> list[str]:
    """The settings that arrays do not tell and that differ from CLIP's."""
    config = encoder.config
    clip = {"num_attention_heads": config.hidden_size // HEAD_DIM, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    other = [key for key, value in clip.items() if getattr(config, key) != value]
    return [f"{key} {getattr(config, key)} (where {clip[key]} is assumed)" for key in other]
