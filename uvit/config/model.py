"""The config of a U-ViT: a preset by its name, or a JSON file of the model's arguments."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvit.config.presets import no_such_preset, preset_files
from uvit.errors import UserError

FLAG = "--uvit_config_file"

KINDS: dict[str, tuple[type, ...]] = {  # the arguments of UViTT2IModel
    "sample_size": (int, list),
    "patch_size": (int,),
    "in_channels": (int,),
    "num_layers": (int,),
    "num_attention_heads": (int,),
    "attention_head_dim": (int,),
    "mlp_ratio": (int, float),
    "qkv_bias": (bool,),
    "clip_dim": (int,),
    "num_text_tokens": (int,),
    "conv": (bool,),
    "bottleneck_dim": (int, type(None)),
}
# How to sample with its weights: what the config.json of trained weights has besides. A new model has none of it.
SAMPLING_KEYS = ("latent_scale", "latent_shift", "latent_std", "timestep_labels", "prediction_type", "latents")
# What PaddleMIX's configs have besides, and the values at which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {"norm_type": ("layer_norm",), "qk_scale": (None,)}
DROPOUT = ("attn_drop_rate", "drop_rate", "pos_drop_rate")  # has no weights


def model_config_names() -> list[str]:
    """The names of the model presets, sorted."""
    return list(preset_files("model"))


def resolve_model_config(name_or_path: str) -> dict[str, Any]:
    """The arguments of `UViTT2IModel` in a JSON file or a preset.

    A preset's name may lack its `uvit_` or `uvit_t2i_`, and "giant" stands for "gaint". The file name of a path that
    does not exist is a name too, because older command lines have `config/uvit_t2i_small.json`. Keys that begin with
    `_`, diffusers' own, are dropped, and so are SAMPLING_KEYS and PaddleMIX's at values that change nothing. Raises
    UserError for anything else.
    """
    path = Path(name_or_path)
    if not path.is_file():
        name, presets = path.name.removesuffix(".json").replace("giant", "gaint"), preset_files("model")
        found = [presets[whole] for whole in (name, f"uvit_{name}", f"uvit_t2i_{name}") if whole in presets]
        if not found:
            raise no_such_preset("model", FLAG, name_or_path)
        path = found[0]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} {path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{FLAG} {path}: must map names to values, and holds {type(content).__name__}")
    where = f"{FLAG} {path}"
    check_neutral(content, where)
    for key in DROPOUT:
        if content.get(key, 0) not in (0, None):
            raise UserError(f"{where}: {key} is {content[key]!r}, and this U-ViT has no dropout; set it to 0")
    foreign = (*SAMPLING_KEYS, *NEUTRAL, *DROPOUT, "out_channels")
    config = {key: value for key, value in content.items() if not key.startswith("_") and key not in foreign}
    for key, value in config.items():
        _check(path, key, value)
    return config


def check_neutral(content: Mapping[str, Any], where: object) -> None:
    """Raises UserError if a config asks for what only PaddleMIX's U-ViT has."""
    for key, values in NEUTRAL.items():
        if content.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key} is {content[key]!r}, which this U-ViT does not have")
    if content.get("out_channels") not in (None, content.get("in_channels")):
        raise UserError(f"{where}: out_channels {content['out_channels']} differs from in_channels")


def _check(path: Path, key: str, value: Any) -> None:
    if key not in KINDS:
        close = difflib.get_close_matches(key, KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(KINDS)}"
        raise UserError(f"{FLAG} {path}: there is no key {key!r}; {hint}")
    if KINDS[key] == (bool,):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(value, list) and list in KINDS[key]:
        fits, wanted = (
            len(value) == 2 and all(type(side) is int and side > 0 for side in value),
            "[height, width]",
        )
    elif value is None and type(None) in KINDS[key]:
        return
    else:
        fits = type(value) in KINDS[key] and not isinstance(value, list) and value > 0
        wanted = "a positive number" if float in KINDS[key] else "a positive whole number"
    if not fits:
        raise UserError(f"{FLAG} {path}: {key} is {json.dumps(value)}; it must be {wanted}")


def model_arguments(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of UViTT2IModel in a config of ours or of PaddleMIX. Raises UserError where a value is wrong."""
    check_neutral(content, path)
    arguments = {key: value for key, value in content.items() if key in KINDS}
    for key, value in arguments.items():
        if value is None and type(None) in KINDS[key]:
            continue
        sizes = value if isinstance(value, list) else [value]
        wrong = isinstance(value, list) and len(value) != 2
        if (
            wrong
            or type(value) not in KINDS[key]
            or not all(isinstance(size, (int, float)) and size >= 0 for size in sizes)
        ):
            raise UserError(f"{path}: {key} is {value!r}, which must be {' or '.join(k.__name__ for k in KINDS[key])}")
    return arguments
