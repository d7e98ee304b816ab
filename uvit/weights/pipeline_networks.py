"""The networks of a pipeline folder, each with all of its weights and no others.

Where a file lacks some, diffusers and transformers fill them with random numbers, and what is left over they pass over.
When they load a pipeline, they say so in a log message at most.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import nn

from uvit.weights.clip_text import read_clip_text
from uvit.weights.detect import CONFIG
from uvit.weights.encoders import text_encoder_class

UNUSED = ("pooler", "position_ids")  # in names of text encoders: weights that have no effect


def load_pipeline_encoders(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """{vqvae, text_encoder: the network} of a pipeline folder of ours, those that it has, for its `from_pretrained`.

    Raises ValueError where weights are missing or left over, and what diffusers and transformers raise.
    """
    networks: dict[str, Any] = {}
    for name in ("vqvae", "text_encoder"):
        place = folder / name
        if not (place / CONFIG).is_file():
            continue
        if name == "text_encoder" and (encoder := read_clip_text(place, dtype)) is not None:
            networks[name] = encoder
            continue
        load = (AutoencoderKL if name == "vqvae" else text_encoder_class(place)).from_pretrained
        networks[name], info = load(place, dtype=dtype, use_safetensors=True, output_loading_info=True)
        _check(name, info["missing_keys"], info["unexpected_keys"])
    return networks


def check_unet_weights(unet: nn.Module, folder: Path) -> None:
    """Raises ValueError where the U-ViT of a pipeline folder has been opened without all of its weights.

    Unlike other networks, it has had the same names in all versions.
    """
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = weights.with_name(f"{weights.name}.index.json")
    if index.is_file():
        stored = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"]}
    else:
        with safe_open(weights, "pt") as file:
            stored = {*file.keys()}
    expected = {*unet.state_dict()}
    _check("unet", expected - stored, stored - expected)


def _check(name: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    for what, keys in (("lacks", missing), ("has too much", left_over)):
        if wrong := sorted(key for key in keys if not any(word in key for word in UNUSED)):
            raise ValueError(f"{name} {what}: {wrong[0]}" + f" and {len(wrong) - 1} more" * (len(wrong) > 1))
