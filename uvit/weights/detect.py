"""What a set of weights is, by the names and shapes in it."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from uvit.errors import UserError
from uvit.weights.encoders import WEIGHT_SUFFIXES
from uvit.weights.files import container_of, is_paddle_file, read_weights
from uvit.weights.report import shorten

WeightsKind = Literal["uvit", "trainer", "vae", "ldm_vae", "text_encoder"]

WRAPPERS = ("state_dict.", "model.", "module.", "_orig_mod.")  # what trainers put around a whole network's names

# One name of each network that no other has.
_KEYS_OF_KIND: dict[WeightsKind, tuple[str, ...]] = {
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
_WORDS: dict[WeightsKind, str] = {
    "trainer": "a checkpoint of the Paddle trainer",
    "uvit": "a U-ViT",
    "vae": "a VAE",
    "ldm_vae": "a VAE under its first names",
    "text_encoder": "a CLIP text encoder",
}
_OTHERS = {  # U-ViTs of other tasks
    "label_emb.weight": "is a U-ViT for classes, not for text",
    "time_embed.0.weight": "is a U-ViT with an MLP on its time token, which ours does not have",
}


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what stands around all names."""
    found = dict(tensors)
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def recognise(tensors: Mapping[str, Tensor], path: Path) -> WeightsKind:
    """What the (unwrapped) tensors are. Raises UserError where they are several things, or nothing known."""
    kinds = [kind for kind, signs in _KEYS_OF_KIND.items() if any(sign in tensors for sign in signs)]
    for name, what in _OTHERS.items():
        if kinds == ["uvit"] and name in tensors:
            raise UserError(f"{path}: {what}; only text-to-image U-ViTs can be converted")
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise UserError(
            f"{path}: mixes {' and '.join(_WORDS[kind] for kind in kinds)} in one file; give a file for each"
        )
    raise UserError(
        f"{path}: holds {len(tensors)} arrays ({shorten(sorted(tensors))}) that are no U-ViT, VAE or CLIP text encoder"
    )


def kind_name(kind: WeightsKind) -> str:
    return _WORDS[kind]


# What a file or a folder is, told by the names in it and by heads of files, before any network of it is read


INDEX, CONFIG = "model_index.json", "config.json"
NO_NETWORKS = ("optimizer", "lr_scheduler", "scheduler", "scaler", "step", "training_args", "rng_state")  # of trainers
Network = Literal["unet", "vqvae", "text_encoder"]
COMPONENT_OF = {"uvit": "unet", "vae": "vqvae", "ldm_vae": "vqvae", "text_encoder": "text_encoder", "trainer": "all"}
TRAINER_PREFIXES = {"unet": "unet.", "vqvae": "vae.", "text_encoder": "text_encoder."}
FOLDERS = {"unet": ("unet",), "vqvae": ("vqvae", "vae"), "text_encoder": ("text_encoder",), "tokenizer": ("tokenizer",)}
FLAGS = {"vqvae": "vae_name_or_path", "text_encoder": "text_encoder_name_or_path", "tokenizer": "tokenizer_name"}
_SIGNS = {"unet": {"num_layers"}, "vqvae": {"block_out_channels"}, "text_encoder": {"vocab_size", "hidden_size"}}


def read_config(path: Path) -> dict[str, Any]:
    """Raises UserError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must map names to values, and holds {type(content).__name__}")
    return content


def config_beside(weights: Path, part: Network) -> Path | None:
    """The config of a network in that file: PART.json, which we write where several lie together, or config.json."""
    for path in (weights.with_name(f"{part}.json"), weights.with_name(CONFIG)):
        if path.is_file() and _SIGNS[part] & set(read_config(path)):
            return path
    return None


def config_beside_contents(weights: Path, part: Network) -> dict[str, Any] | None:
    """What it says."""
    path = config_beside(weights, part)
    return None if path is None else read_config(path)


def is_port_folder(folder: Path) -> bool:
    """Whether this is a pipeline folder of the Paddle port."""
    if not (folder / INDEX).is_file():
        return False
    index = read_config(folder / INDEX)
    libraries = [value[0] for value in index.values() if isinstance(value, list) and value]
    return "_ppdiffusers_version" in index or any(str(name).startswith(("ppdiffusers", "paddle")) for name in libraries)


def has_code(folder: Path) -> bool:
    """Whether this is a pipeline folder with code of its own, which diffusers would want to run."""
    unet = read_config(folder / INDEX).get("unet") if (folder / INDEX).is_file() else None
    return isinstance(unet, list) and len(unet) == 2 and (folder / "unet" / f"{unet[0]}.py").is_file()


def is_third_party(name_or_path: str | Path | None) -> bool:
    """Whether this is a file of weights, or a folder, that the official U-ViT code or PaddleMIX wrote.

    What is not on this machine is not: it may be a hub id.
    """
    if name_or_path is None or not (path := Path(name_or_path).expanduser()).exists():
        return False
    if path.is_file():
        return True
    files = weight_files(path / "unet" if (path / INDEX).is_file() and (path / "unet").is_dir() else path)
    return is_port_folder(path) or has_code(path) or any(_foreign_file(file) for file in files)


def _foreign_file(path: Path) -> bool:
    return container_of(path) != "safetensors" or "paddle" in path.name or is_paddle_file(path)


def weight_files(folder: Path) -> list[Path]:
    """Files that may hold a network."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in WEIGHT_SUFFIXES)
    return [path for path in files if not path.name.startswith(NO_NETWORKS)]


def is_average(path: Path) -> bool:
    """Trainers tell the average of the weights by its file's name: nnet_ema.pth, model_state.ema.pdparams."""
    return "ema" in path.stem.replace(".", "_").split("_")


def part_folders(folder: Path) -> dict[str, Path]:
    """{part: its folder} of those that lie in a folder."""
    found = {part: [folder / name for name in names if (folder / name).is_dir()] for part, names in FOLDERS.items()}
    return {part: folders[0] for part, folders in found.items() if folders}


def missing_parts(pipeline: Path) -> list[str]:
    """What a pipeline folder's index names and the folder has not."""
    index = read_config(pipeline / INDEX)
    named = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    return sorted(name for name in named if not (pipeline / name).is_dir())


def has_part(name_or_path: str, part: str) -> bool:
    """Whether it has the network or the tokenizer. Of what is not on this machine that is not known: True."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return True
    files = [path] if path.is_file() else weight_files(path)
    if path.is_dir() and (part in part_folders(path) or not files):
        return part in part_folders(path)
    if part == "tokenizer":
        return path.is_dir() and (path / "vocab.json").is_file()
    return any(part in _parts_of(file) for file in files)


@functools.cache  # a large file is looked at once
def _parts_of(path: Path) -> set[str]:
    tensors: Mapping[str, Any] = unwrap(read_weights(path).tensors)
    kind = recognise(tensors, path)
    if kind != "trainer":
        return {COMPONENT_OF[kind]}
    return {part for part, prefix in TRAINER_PREFIXES.items() if any(name.startswith(prefix) for name in tensors)}


def first_that_has(part: str, pretrained: str | None, *others: str | None) -> str | None:
    """Where to take a part from: the first name that is given, the pretrained one only where it has that part."""
    names = (pretrained if pretrained is not None and has_part(pretrained, part) else None, *others)
    return next((name for name in names if name), None)
