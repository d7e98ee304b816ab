"""The config of a U-ViT: a preset by its name, or a JSON file of the model's arguments.

Its `_class_name`, diffusers' key, says which U-ViT it is of: MODERN, or else the published one.
"""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvit.config.presets import no_such_preset, preset_files
from uvit.errors import UserError

FLAG = "--uvit_config_file"

CLASS_KEY, MODERN = "_class_name", "ModernUViTT2IModel"
Kinds = dict[str, tuple[type, ...]]
KINDS: Kinds = {  # the arguments of UViTT2IModel
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
MODERN_KINDS: Kinds = {key: kinds for key, kinds in KINDS.items() if key not in ("mlp_ratio", "qkv_bias")}
MODERN_KINDS |= {"skip": (str,)}
KEY_CHOICES = {"skip": ("concat", "add", "none")}
# How to sample with its weights: what the config.json of trained weights has besides. A new model has none of it.
SAMPLING_KEYS = (
    "latent_scale", "latent_shift", "latent_std", "timestep_labels", "prediction_type", "path", "latents",
)  # fmt: skip
# What configs of PaddleMIX and of the official U-ViT code have besides, and the values at which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {"norm_type": ("layer_norm",), "qk_scale": (None,), "mlp_time_embed": (False,)}
DROPOUT = ("attn_drop_rate", "drop_rate", "pos_drop_rate")  # has no weights


def kinds_of(config: Mapping[str, Any]) -> Kinds:
    """The arguments of the U-ViT that a config is of, and their types."""
    return MODERN_KINDS if config.get(CLASS_KEY) == MODERN else KINDS


def model_config_names() -> list[str]:
    """The names of the model presets, sorted."""
    return list(preset_files("model"))


def resolve_model_config(name_or_path: str) -> dict[str, Any]:
    """The arguments of a U-ViT in a JSON file or a preset; of a MODERN one, its `_class_name` too.

    A preset's name may lack its `uvit_` or `uvit_t2i_`, and "giant" stands for "gaint". The file name of a path that
    does not exist is a name too, because older command lines have `config/uvit_t2i_small.json`. Other keys that begin
    with `_`, diffusers' own, are dropped, and so are SAMPLING_KEYS and PaddleMIX's at values that change nothing.
    Raises UserError for anything else.
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
        _check(path, key, value, kinds_of(content))
    return _class_of(content) | config


def _class_of(content: Mapping[str, Any]) -> dict[str, Any]:
    return {CLASS_KEY: MODERN} if content.get(CLASS_KEY) == MODERN else {}


def check_neutral(content: Mapping[str, Any], where: object) -> None:
    """Raises UserError if a config asks for what only PaddleMIX's U-ViT has."""
    for key, values in NEUTRAL.items():
        if content.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key} is {content[key]!r}, which this U-ViT does not have")
    if content.get("out_channels") not in (None, content.get("in_channels")):
        raise UserError(f"{where}: out_channels {content['out_channels']} differs from in_channels")


def _check(path: Path, key: str, value: Any, known: Kinds) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
        raise UserError(f"{FLAG} {path}: there is no key {key!r}; {hint}")
    kinds = known[key]
    if kinds == (bool,):
        fits, wanted = isinstance(value, bool), "true or false"
    elif key in KEY_CHOICES:
        fits, wanted = value in KEY_CHOICES[key], " or ".join(map(json.dumps, KEY_CHOICES[key]))
    elif isinstance(value, list) and list in kinds:
        fits, wanted = (
            len(value) == 2 and all(type(side) is int and side > 0 for side in value),
            "[height, width]",
        )
    elif value is None and type(None) in kinds:
        return
    else:
        fits = type(value) in kinds and not isinstance(value, list) and 0 < value < math.inf
        wanted = "a positive number" if float in kinds else "a positive whole number"
    if not fits:
        raise UserError(f"{FLAG} {path}: {key} is {json.dumps(value)}; it must be {wanted}")


def model_arguments(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of a U-ViT, as of `resolve_model_config`, in a config of ours or of PaddleMIX.

    Raises UserError where a value is wrong.
    """
    check_neutral(content, path)
    known = kinds_of(content)
    arguments = {key: value for key, value in content.items() if key in known}
    for key, value in arguments.items():
        if (value is None and type(None) in known[key]) or value in KEY_CHOICES.get(key, ()):
            continue
        sizes = value if isinstance(value, list) else [value]
        wrong = isinstance(value, list) and len(value) != 2
        if (
            wrong
            or type(value) not in known[key]
            or not all(isinstance(size, (int, float)) and 0 <= size < math.inf for size in sizes)
        ):
            wanted = KEY_CHOICES.get(key) or [kind.__name__ for kind in known[key]]
            raise UserError(f"{path}: {key} is {value!r}, which must be {' or '.join(wanted)}")
    return _class_of(content) | arguments
