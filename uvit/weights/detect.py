"""Detect what arrays, folders and configs are, by the names in them, before any network is built."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from uvit.config.model import model_arguments, resolve_model_config
from uvit.errors import UserError, a_type
from uvit.weights.encoders import WEIGHT_SUFFIXES
from uvit.weights.files import SHARD, container_of, is_paddle_file, read_weights
from uvit.weights.report import shorten

Network = Literal["unet", "vqvae", "text_encoder"]
WeightsKind = Literal["uvit", "vae", "ldm_vae", "text_encoder"]

INDEX, CONFIG = "model_index.json", "config.json"
FLAGS = {"vqvae": "vae_name_or_path", "text_encoder": "text_encoder_name_or_path", "tokenizer": "tokenizer_name"}


# What arrays are

COMPONENT_OF = {"uvit": "unet", "vae": "vqvae", "ldm_vae": "vqvae", "text_encoder": "text_encoder"}
KIND_NAMES: dict[WeightsKind, str] = {
    "uvit": "a U-ViT",
    "vae": "a VAE",
    "ldm_vae": "a VAE with its original (LDM) names",
    "text_encoder": "a CLIP text encoder",
}
# Modules that wrap others, anywhere in a name: DDP, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Names that only this kind has; one of them is enough.
_NAMES_OF_KIND: dict[WeightsKind, tuple[str, ...]] = {
    "uvit": ("pos_embed", "mid_block.attn.qkv.weight", "patch_embed.proj.weight"),
    "vae": ("encoder.mid_block.resnets.0.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight"),
    "ldm_vae": ("encoder.mid.block_1.conv1.weight", "decoder.mid.block_1.conv1.weight"),
    "text_encoder": ("embeddings.token_embedding.weight", "text_model.token_embedding.weight"),
}
_UNSUPPORTED_UVITS = {
    "label_emb.weight": "is a class-conditional U-ViT; only text-to-image U-ViTs can be converted",
    "time_embed.0.weight": "is a U-ViT with an MLP on its time token (mlp_time_embed), which is not supported",
}
# What trainers keep beside the weights.
_TRAINING_STATE = (
    "opt.",
    "optim",
    "lr_scheduler",
    "scheduler",
    "scaler",
    "rng",
    "random",
    "callbacks",
    "loops",
    "loss.",
)
_EMA_WORD = re.compile(r"(?<![a-z])(ema|shadow|averaged?)(?![a-z])|EMA|Ema")


@dataclass(frozen=True)
class FoundNetwork:
    """One network among the arrays of a file.

    Attributes:
        prefix: what its names begin with in the file: `model.`, `ema.`, or nothing.
        tensors: by their names in the network.
    """

    kind: WeightsKind
    prefix: str
    tensors: dict[str, Tensor]

    @property
    def is_ema(self) -> bool:
        return is_ema_name(self.prefix)


def is_ema_name(name: str) -> bool:
    """Whether a prefix or the name of a file says that the weights are EMA weights: nnet_ema, ema.module, model_ema.

    The last part that says either counts: in `ema.online_model` the weights are raw.
    """
    parts = name.split(".")
    return next((bool(_EMA_WORD.search(p)) for p in reversed(parts) if _EMA_WORD.search(p) or "online" in p), False)


def unwrap(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the parts of names that come from WRAPPERS. Raises UserError where two arrays get one name."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in found and not torch.equal(found[plain], value):
            raise UserError(f"{path}: holds two different arrays {plain}, with and without wrappers; keep one of them")
        found[plain] = value
    return found


def find_networks(tensors: Mapping[str, Tensor], path: Path) -> list[FoundNetwork]:
    """The networks among (unwrapped) arrays, whatever their names begin with.

    EMA weights without names, or with names without dots, get the names of the raw weights beside them. Raises
    UserError where there is no network, or two kinds of them are mixed.
    """
    prefixes: dict[str, WeightsKind] = {}
    for name in tensors:
        for kind, names in _NAMES_OF_KIND.items():
            for known in names:
                if name != known and not name.endswith(f".{known}"):
                    continue
                prefix = name.removesuffix(known)
                if kind == "text_encoder" and (prefix == "text_model." or prefix.endswith(".text_model.")):
                    prefix = prefix.removesuffix("text_model.")
                if (other := prefixes.setdefault(prefix, kind)) != kind:
                    mixed = f"{KIND_NAMES[other]} and {KIND_NAMES[kind]}"
                    raise UserError(f"{path}: holds {mixed} under the same names; give one file for each")
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    longest_first = sorted(prefixes, key=len, reverse=True)
    for name, value in tensors.items():
        where = next((prefix for prefix in longest_first if name.startswith(prefix)), None)
        own = name.removeprefix(where or "")
        if where is not None and value.ndim and not own.startswith(_TRAINING_STATE) and not is_ema_name(own):
            groups[where][own] = value
    found = [FoundNetwork(kind, prefix, groups[prefix]) for prefix, kind in prefixes.items()]
    named = [network for network in found if any("." in name for name in network.tensors)]
    for network in named:
        for name, problem in _UNSUPPORTED_UVITS.items():
            if network.kind == "uvit" and name in network.tensors:
                raise UserError(f"{path}: {problem}")
    if not named:
        if any(re.search(r"(^|\.)shadow_params\.0$", name) for name in tensors):
            raise UserError(
                f"{path}: holds EMA weights without names (shadow_params), as EMAModel of diffusers keeps them; give a "
                "file that has the model's state_dict too"
            )
        raise UserError(
            f"{path}: holds {len(tensors)} arrays ({shorten(sorted(tensors))}), which are not a U-ViT, a VAE or a CLIP "
            "text encoder"
        )
    used = {network.prefix + name for network in named for name in network.tensors}
    rest = {name: value for name, value in tensors.items() if name not in used}
    return [*named, *(ema for network in named if not network.is_ema for ema in _ema_without_names(rest, network))]


def _ema_without_names(tensors: Mapping[str, Tensor], raw: FoundNetwork) -> Iterator[FoundNetwork]:
    """EMA weights of `raw` as a list in its order (diffusers' EMAModel), or with dotless names (LDM, PaddleMIX)."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, dot, last = name.rpartition(".")
        if value.ndim and is_ema_name(prefix):
            groups.setdefault(prefix + dot, {})[last] = value
    parts = raw.prefix.split(".")
    starts = [".".join(parts[i:]) for i in range(len(parts))]  # of the names that the EMA knows
    dotless = {(start + name).replace(".", ""): name for start in starts for name in raw.tensors}
    parameters = [name for name, value in raw.tensors.items() if value.is_floating_point()]
    for prefix, group in groups.items():
        if all(name.isdigit() for name in group):
            shapes = [value.shape for value in group.values()]
            if shapes == [raw.tensors[name].shape for name in parameters]:
                yield FoundNetwork(raw.kind, prefix, dict(zip(parameters, group.values(), strict=True)))
        elif ema := {dotless[name]: value for name, value in group.items() if name in dotless}:
            yield FoundNetwork(raw.kind, prefix, ema)


# What a folder is

COMPONENT_FOLDERS = {
    "unet": ("unet",),
    "vqvae": ("vqvae", "vae"),
    "text_encoder": ("text_encoder",),
    "tokenizer": ("tokenizer",),
}
# Other files of trainers with the suffixes of weights begin so.
_STATE_FILES = (
    "optimizer", "lr_scheduler", "scheduler", "scaler", "step", "training_args", "rng_state", "random_states",
    "sampler",
)  # fmt: skip


HALF = re.compile(r"\.(fp16|bf16)(?=\.)")  # in names of files that diffusers and transformers open only if asked


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


def is_third_party(name_or_path: str | Path | None, component: Network = "unet") -> bool:
    """Whether diffusers and transformers cannot open it as it is: a file of weights, or a folder of the official U-ViT
    code or of PaddleMIX, or one with its own code.

    Of a pipeline folder, `component` is looked at. False for what is not on this machine: it may be a Hub id.
    """
    if name_or_path is None or not (path := Path(name_or_path)).exists():
        return False
    if path.is_file() or is_paddlemix_folder(path) or (component == "unet" and has_code(path)):
        return True
    is_one_network = not (path / INDEX).is_file() and bool(weight_files(path))
    files = weight_files(path if is_one_network else component_folders(path).get(component, path))
    others = [file for file in files if _is_third_party_file(file)]
    return bool(others) and not any(_is_opened_by_libraries(file) for file in files if file not in others)


def _is_third_party_file(path: Path) -> bool:
    return container_of(path) != "safetensors" or "paddle" in path.name or is_paddle_file(path)


def _is_opened_by_libraries(path: Path) -> bool:
    """Whether this is the file of its folder that diffusers or transformers take, whatever else lies there."""
    is_usual = path.name.startswith(("model", "diffusion_pytorch_model")) and not HALF.search(path.name)
    return is_usual and (path.parent / CONFIG).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Files that may hold a network; of a set of shards, the first."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in WEIGHT_SUFFIXES)
    first: dict[str, Path] = {}
    for path in files:
        if not path.name.startswith(_STATE_FILES):
            first.setdefault(SHARD.sub(r"\1\3\4", path.name), path)
    return list(first.values())


def is_ema_file(path: Path) -> bool:
    """Trainers mark EMA weights in the name of the file: nnet_ema.pth, model_state.ema.pdparams."""
    return is_ema_name(path.stem)


def component_folders(folder: Path) -> dict[str, Path]:
    """{component: its folder}, for those that there are."""
    found = {
        component: [folder / name for name in names if (folder / name).is_dir()]
        for component, names in COMPONENT_FOLDERS.items()
    }
    return {component: folders[0] for component, folders in found.items() if folders}


def listed_components(pipeline: Path) -> list[str]:
    """The components that model_index.json lists, without those that it says are None."""
    index = read_config(pipeline / INDEX)
    listed = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return sorted(name for name, value in listed.items() if value[:1] != [None])


def left_out_components(pipeline: Path) -> set[str]:
    """The components that model_index.json says are None: the VAE of a model on pixels."""
    return {name for name, value in read_config(pipeline / INDEX).items() if value == [None, None]}


def missing_components(pipeline: Path) -> list[str]:
    """The components that model_index.json lists and that have no folder."""
    return [name for name in listed_components(pipeline) if not (pipeline / name).is_dir()]


# Configs beside the weights

CLIP_TEXT = "text_config"  # the text encoder's part of the config of a whole CLIP
_KEYS_OF_CONFIG = {
    "unet": {"num_layers"},
    "vqvae": {"block_out_channels"},
    "text_encoder": {"vocab_size", "hidden_size", CLIP_TEXT},
}


def read_config(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must map names to values, and holds {a_type(content)}")
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
    config = read_config(path)
    if component == "text_encoder" and isinstance(config.get(CLIP_TEXT), dict):
        config = config[CLIP_TEXT]
    return model_arguments(config, path) if component == "unet" else config


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
    found = find_networks(unwrap(read_weights(path).tensors, path), path)
    return {COMPONENT_OF[network.kind] for network in found}


def first_that_has(component: str, pretrained: str | None, *others: str | None) -> str | None:
    """Where to take a component from: the first name given; `pretrained` only if it has that component."""
    names = (pretrained if pretrained is not None and has_component(pretrained, component) else None, *others)
    return next((name for name in names if name), None)
