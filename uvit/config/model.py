"""What describes a U-ViT: a shipped config by its name, or a JSON file of the model's arguments."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvit.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs" / "model"
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
}
# What the Paddle port's configs say beside these, and the values at which it means nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {"norm_type": ("layer_norm",), "qk_scale": (None,)}
DROPOUT = ("attn_drop_rate", "drop_rate", "pos_drop_rate")  # weights are the same with it


def model_config_names() -> list[str]:
    """The shipped configs' names, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def resolve_model_config(name_or_path: str) -> dict[str, Any]:
    """The arguments of `UViTT2IModel` that a name or a JSON file stands for.

    A name is a shipped config's ("giant" serves for "gaint"); so is the file name of a path that is not
    there, because command lines from elsewhere say `config/uvit_t2i_small.json`. Keys that begin with `_`,
    diffusers' own, are left out, and so are those of the Paddle port at values that change nothing. Raises UserError
    for anything else.
    """
    path = Path(name_or_path)
    if not path.is_file():
        name = path.name.removesuffix(".json").replace("giant", "gaint")
        names = model_config_names()
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{FLAG} {name_or_path}: is neither a file nor a shipped config; {hint}shipped are {', '.join(names)}"
            )
        path = FOLDER / f"{name}.json"
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
            raise UserError(f"{where}: {key} is {content[key]!r}, and our U-ViT has no dropout; make it 0")
    of_port = (*NEUTRAL, *DROPOUT, "out_channels")
    config = {key: value for key, value in content.items() if not key.startswith("_") and key not in of_port}
    for key, value in config.items():
        _check(path, key, value)
    return config


def check_neutral(content: Mapping[str, Any], where: object) -> None:
    """Raises UserError where a config asks for what the Paddle port's U-ViT has and ours has not."""
    for key, values in NEUTRAL.items():
        if content.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key} is {content[key]!r}, which our U-ViT does not have")
    if content.get("out_channels") not in (None, content.get("in_channels")):
        raise UserError(f"{where}: out_channels {content['out_channels']} differ from in_channels")


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
    else:
        fits = type(value) in KINDS[key] and not isinstance(value, list) and value > 0
        wanted = "a positive number" if float in KINDS[key] else "a positive whole number"
    if not fits:
        raise UserError(f"{FLAG} {path}: {key} is {json.dumps(value)}; it must be {wanted}")
