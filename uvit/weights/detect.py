"""Detect what arrays, folders and configs are, by the names in them, before any network is built."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from uvit.config.model import model_arguments, resolve_model_config
from uvit.errors import UserError
from uvit.weights.encoders import WEIGHT_SUFFIXES
from uvit.weights.files import container_of, is_paddle_file, read_weights
from uvit.weights.report import shorten

Network = Literal["unet", "vqvae", "text_encoder"]
WeightsKind = Literal["uvit", "trainer", "vae", "ldm_vae", "text_encoder"]

INDEX, CONFIG = "model_index.json", "config.json"
FLAGS = {"vqvae": "vae_name_or_path", "text_encoder": "text_encoder_name_or_path", "tokenizer": "tokenizer_name"}


# What arrays are

COMPONENT_OF = {"uvit": "unet", "vae": "vqvae", "ldm_vae": "vqvae", "text_encoder": "text_encoder", "trainer": "all"}
KIND_NAMES: dict[WeightsKind, str] = {
    "trainer": "a checkpoint of the PaddleMIX trainer",
    "uvit": "a U-ViT",
    "vae": "a VAE",
    "ldm_vae": "a VAE with its original (LDM) names",
    "text_encoder": "a CLIP text encoder",
}
WRAPPERS = ("state_dict.", "model.", "module.", "_orig_mod.")  # prefixes that trainers add to all names
TRAINER_PREFIXES = {"unet": "unet.", "vqvae": "vae.", "text_encoder": "text_encoder."}

# Names that only this kind has; one of them is enough.
_NAMES_OF_KIND: dict[WeightsKind, tuple[str, ...]] = {
    "trainer": ("unet.pos_embed",),
    "uvit": ("pos_embed", "mid_block.attn.qkv.weight", "patch_embed.proj.weight"),
    "vae": ("encoder.mid_block.resnets.0.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight"),
    "ldm_vae": ("encoder.mid.block_1.conv1.weight", "decoder.mid.block_1.conv1.weight"),
    "text_encoder": (
        "text_model.embeddings.token_embedding.weight",
        "embeddings.token_embedding.weight",
        "text_model.token_embedding.weight",
    ),
}
_UNSUPPORTED_UVITS = {
    "label_emb.weight": "is a class-conditional U-ViT; only text-to-image U-ViTs can be converted",
    "time_embed.0.weight": "is a U-ViT with an MLP on its time token (mlp_time_embed), which is not supported",
}


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that all names share."""
    found = dict(tensors)
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None):
        found = with_prefix(found, prefix)
    return found


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names have the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def detect_kind(tensors: Mapping[str, Tensor], path: Path) -> WeightsKind:
    """What the (unwrapped) tensors are. Raises UserError where they are of several kinds, or of none."""
    kinds = [kind for kind, names in _NAMES_OF_KIND.items() if any(name in tensors for name in names)]
    for name, problem in _UNSUPPORTED_UVITS.items():
        if kinds == ["uvit"] and name in tensors:
            raise UserError(f"{path}: {problem}")
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        mixed = " and ".join(KIND_NAMES[kind] for kind in kinds)
        raise UserError(f"{path}: holds {mixed} in one file; give one file for each")
    raise UserError(
        f"{path}: holds {len(tensors)} arrays ({shorten(sorted(tensors))}), which are not a U-ViT, a VAE or a CLIP "
        "text encoder"
    )


# What a folder is

COMPONENT_FOLDERS = {
    "unet": ("unet",),
    "vqvae": ("vqvae", "vae"),
    "text_encoder": ("text_encoder",),
    "tokenizer": ("tokenizer",),
}
# Other files of trainers with the suffixes of weights begin so.
_STATE_FILES = ("optimizer", "lr_scheduler", "scheduler", "scaler", "step", "training_args", "rng_state")


def is_paddlemix_folder(folder: Path) -> bool:
    """Whether this is a pipeline folder of PaddleMIX."""
    if not (folder / INDEX).is_file():
        return False
    index = read_config(folder / INDEX)
    libraries = [value[0] for value in index.values() if isinstance(value, list) and value]
    return "_ppdiffusers_version" in index or any(str(name).startswith(("ppdiffusers", "paddle")) for name in libraries)


def has_code(folder: Path) -> bool:
    """Whether this is a pipeline folder with its own code, which diffusers would want to run."""
    unet = read_config(folder / INDEX).get("unet") if (folder / INDEX).is_file() else None
    return isinstance(unet, list) and len(unet) == 2 and (folder / "unet" / f"{unet[0]}.py").is_file()


def is_third_party(name_or_path: str | Path | None) -> bool:
    """Whether diffusers and transformers cannot open it as it is: a file of weights, or a folder of the official U-ViT
    code or of PaddleMIX, or one with its own code.

    False for what is not on this machine: it may be a Hub id.
    """
    if name_or_path is None or not (path := Path(name_or_path)).exists():
        return False
    if path.is_file():
        return True
    files = weight_files(path / "unet" if (path / INDEX).is_file() and (path / "unet").is_dir() else path)
    return is_paddlemix_folder(path) or has_code(path) or any(_is_third_party_file(file) for file in files)


def _is_third_party_file(path: Path) -> bool:
    return container_of(path) != "safetensors" or "paddle" in path.name or is_paddle_file(path)


def weight_files(folder: Path) -> list[Path]:
    """Files that may hold a network."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in WEIGHT_SUFFIXES)
    return [path for path in files if not path.name.startswith(_STATE_FILES)]


def is_ema_file(path: Path) -> bool:
    """Trainers mark EMA weights in the name of the file: nnet_ema.pth, model_state.ema.pdparams."""
    return "ema" in path.stem.replace(".", "_").split("_")


def component_folders(folder: Path) -> dict[str, Path]:
    """{component: its folder}, for those that there are."""
    found = {
        component: [folder / name for name in names if (folder / name).is_dir()]
        for component, names in COMPONENT_FOLDERS.items()
    }
    return {component: folders[0] for component, folders in found.items() if folders}


def listed_components(pipeline: Path) -> list[str]:
    """The components that model_index.json lists."""
    index = read_config(pipeline / INDEX)
    return sorted(name for name, value in index.items() if isinstance(value, list) and not name.startswith("_"))


def missing_components(pipeline: Path) -> list[str]:
    """The components that model_index.json lists and that have no folder."""
    return [name for name in listed_components(pipeline) if not (pipeline / name).is_dir()]


# Configs beside the weights

_KEYS_OF_CONFIG = {
    "unet": {"num_layers"},
    "vqvae": {"block_out_channels"},
    "text_encoder": {"vocab_size", "hidden_size"},
}


def read_config(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must map names to values, and holds a {type(content).__name__}")
    return content


def config_beside(weights: Path, component: Network) -> Path | None:
    """The config of a network in that file: COMPONENT.json, which `uvit convert` writes where several networks lie
    together, or config.json."""
    for path in (weights.with_name(f"{component}.json"), weights.with_name(CONFIG)):
        if path.is_file() and _KEYS_OF_CONFIG[component] & set(read_config(path)):
            return path
    return None


def network_config(weights: Path, component: Network, config_file: str | None) -> dict[str, Any] | None:
    """The config of a network in that file; `config_file` (--uvit_config_file) replaces that of a U-ViT."""
    if component == "unet" and config_file is not None:
        return resolve_model_config(config_file)
    if (path := config_beside(weights, component)) is None:
        return None
    return model_arguments(read_config(path), path) if component == "unet" else read_config(path)


# Which source has a component


def has_component(name_or_path: str, component: str) -> bool:
    """Whether a source has the network or the tokenizer. True for what is not on this machine: it may have it."""
    path = Path(name_or_path)
    if not path.exists():
        return True
    files = [path] if path.is_file() else weight_files(path)
    if path.is_dir() and (component in component_folders(path) or not files):
        return component in component_folders(path)
    if component == "tokenizer":
        return path.is_dir() and (path / "vocab.json").is_file()
    return any(component in _components_in(file) for file in files)


@functools.cache  # large files are read once
def _components_in(path: Path) -> set[str]:
    tensors = unwrap(read_weights(path).tensors)
    kind = detect_kind(tensors, path)
    if kind != "trainer":
        return {COMPONENT_OF[kind]}
    return {part for part, prefix in TRAINER_PREFIXES.items() if any(name.startswith(prefix) for name in tensors)}


def first_that_has(component: str, pretrained: str | None, *others: str | None) -> str | None:
    """Where to take a component from: the first name given; `pretrained` only if it has that component."""
    names = (pretrained if pretrained is not None and has_component(pretrained, component) else None, *others)
    return next((name for name in names if name), None)
