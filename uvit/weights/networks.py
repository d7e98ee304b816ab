"""Pass one of reading weights: the arrays of each network in a source.

`locate` says where the components of a source lie. `read_networks` reads the arrays there, and gives one
`NetworkWeights` for each network. `components.py` is pass two: it builds the networks from them.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from uvit.errors import UserError
from uvit.weights.detect import (
    COMPONENT_FOLDERS,
    COMPONENT_OF,
    INDEX,
    KIND_NAMES,
    TRAINER_PREFIXES,
    Network,
    WeightsKind,
    component_folders,
    detect_kind,
    is_ema_file,
    is_paddlemix_folder,
    listed_components,
    network_config,
    unwrap,
    weight_files,
    with_prefix,
)
from uvit.weights.encoders import WEIGHT_SUFFIXES
from uvit.weights.files import read_weights
from uvit.weights.report import Report, shorten


@dataclass(frozen=True)
class Location:
    """Where a component lies.

    Attributes:
        component: None: any networks; the arrays say which.
        saved_by_library: whether the loaders of diffusers and transformers open it; else its arrays are read.
    """

    path: Path
    component: str | None = None
    saved_by_library: bool = False


@dataclass(frozen=True)
class NetworkWeights:
    """The weights of one network, as a file holds them.

    Attributes:
        config: of the network, from --uvit_config_file or the JSON file beside the weights. None: the shapes tell it.
        paddle: whether Linear weights are (in, out); read for VAEs only, as the shapes of other networks tell it.
        is_raw: whether these are the raw weights of a U-ViT whose EMA weights came just before.
    """

    kind: WeightsKind
    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] | None = None
    paddle: bool = False
    is_raw: bool = False

    @property
    def component(self) -> str:
        return COMPONENT_OF[self.kind]


# Where the components lie


def locate(source: Path, overridden: Collection[str] = ()) -> list[Location]:
    """Where the components of a source lie, without those `overridden` by flags.

    Raises UserError where there is no such source, or a pipeline folder lacks one of its components.
    """
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder")
    if source.is_file():
        return [Location(source)]
    if (source / INDEX).is_file():
        locations = _locate_in_pipeline(source, overridden)
    elif not weight_files(source) and (folders := component_folders(source)):
        locations = [Location(folder, name, name != "unet") for name, folder in folders.items()]
    else:
        locations = [Location(source)]
        if (source / "vocab.json").is_file():
            locations.append(Location(source, "tokenizer", True))
    return [location for location in locations if location.component not in overridden]


def _locate_in_pipeline(folder: Path, overridden: Collection[str]) -> list[Location]:
    """PaddleMIX's networks are read from their arrays; of a pipeline with its own code, only the U-ViT is."""
    present = {name for name in listed_components(folder) if (folder / name).is_dir()}
    missing = sorted({*COMPONENT_FOLDERS, "scheduler"} - set(overridden) - present)
    if missing:
        raise UserError(f"{folder}: is not complete, it has no {', '.join(missing)}")
    paddlemix = is_paddlemix_folder(folder)
    by_library = {"unet": False, "vqvae": not paddlemix, "text_encoder": not paddlemix, "tokenizer": True}
    return [Location(folder / name, name, by_library[name]) for name in COMPONENT_FOLDERS if name in present]


# What lies there


def read_networks(
    location: Location, use_ema: bool, config_file: str | None, overridden: Collection[str], report: Report
) -> Iterator[NetworkWeights]:
    """The networks of a file or a folder of files, without those `overridden`, one after another.

    Raises UserError where a file is damaged, or not what it should be.
    """
    if location.path.is_file():
        yield from _read_file(location.path, location.component, use_ema, config_file, overridden, report)
        return
    folder = location.path
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no weights (files {', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})")
    ema, raw = [path for path in files if is_ema_file(path)], [path for path in files if not is_ema_file(path)]
    if ema and not raw and not use_ema:
        raise UserError(f"--use_ema False: {folder} has EMA weights only ({shorten([path.name for path in ema])})")
    take_ema = use_ema and bool(ema)
    chosen = _preferred_format(ema if take_ema else raw) + [path for path in raw if "autoencoder" in path.name]
    has_unet = False
    for path in dict.fromkeys(chosen):
        for weights in _read_file(path, location.component, use_ema, config_file, overridden, report):
            has_unet = has_unet or weights.kind == "uvit"
            yield weights
    if take_ema and has_unet:
        yield from _read_raw(_preferred_format(raw), report)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path not in files)
    if others:
        report.dropped.append(f"{folder}: {shorten(others)}")


def _preferred_format(files: list[Path]) -> list[Path]:
    """Without files that hold the same in another format."""
    formats = (".safetensors", ".pdparams", ".bin")
    best = next((suffix for suffix in formats if any(path.suffix == suffix for path in files)), None)
    return [path for path in files if path.suffix == best or path.suffix not in formats]


def _read_file(
    path: Path,
    component: str | None,
    use_ema: bool,
    config_file: str | None,
    overridden: Collection[str],
    report: Report,
) -> Iterator[NetworkWeights]:
    """component: what the file must hold, as it lies in the folder of that component."""
    content = read_weights(path)
    tensors = unwrap(content.tensors)
    kind = detect_kind(tensors, path)
    containers = {"safetensors": "safetensors", "pdparams": "a Paddle pickle", "pth": "a PyTorch pickle"}
    report.read.append(f"{path}: {KIND_NAMES[kind]}, {len(tensors)} arrays, {containers[content.container]}")
    if others := content.other_entries:
        report.dropped.append(f"{path}: {len(others)} entries that are not arrays ({shorten(list(others))})")
    if component is not None and COMPONENT_OF[kind] != component:
        raise UserError(f"{path}: is {KIND_NAMES[kind]}, where the pipeline's {component} should be")
    if kind == "trainer":
        yield from _split_trainer_checkpoint(tensors, path, use_ema, config_file, overridden, report)
        return
    network: Network = "unet" if kind == "uvit" else "text_encoder" if kind == "text_encoder" else "vqvae"
    if network not in overridden:
        paddle = content.paddle if content.paddle is not None else component is not None
        yield NetworkWeights(kind, path, tensors, network_config(path, network, config_file), paddle)


def _read_raw(files: list[Path], report: Report) -> Iterator[NetworkWeights]:
    """The raw weights beside EMA weights, for formats that hold both."""
    for path in files:
        tensors = unwrap(read_weights(path).tensors)
        if detect_kind(tensors, path) == "uvit":
            report.read.append(f"{path}: the raw weights, kept for formats that hold both")
            yield NetworkWeights("uvit", path, tensors, is_raw=True)


def _split_trainer_checkpoint(
    tensors: Mapping[str, Tensor],
    path: Path,
    use_ema: bool,
    config_file: str | None,
    overridden: Collection[str],
    report: Report,
) -> Iterator[NetworkWeights]:
    """The PaddleMIX trainer keeps all networks in one file, and the EMA weights under names without dots."""
    raw = with_prefix(tensors, "unet.")
    dotless = {name.replace(".", ""): name for name in raw}
    ema_tensors = with_prefix(tensors, "model_ema.")
    ema = {dotless[name]: value for name, value in ema_tensors.items() if name in dotless}
    if "unet" not in overridden:
        config = network_config(path, "unet", config_file)
        if "pos_embed" in ema and not ema["pos_embed"].any() and raw["pos_embed"].any():
            report.dropped.append(
                "model_ema.*: the EMA was never updated (its pos_embed is still 0), a bug of the PaddleMIX trainer"
            )
            ema = {}
        take_ema = use_ema and bool(ema)
        if take_ema and set(ema) != set(raw):
            raise UserError(
                f"{path}: is not complete, model_ema lacks {shorten(sorted(set(raw) - set(ema)))}; --use_ema False "
                "takes the raw weights"
            )
        report.read.append(f"{path}: {'the EMA weights, model_ema.*' if take_ema else 'the raw weights, unet.*'}")
        yield NetworkWeights("uvit", path, ema if take_ema else raw, config)
        if take_ema:
            yield NetworkWeights("uvit", path, raw, is_raw=True)
    if "vqvae" not in overridden and (vae := with_prefix(tensors, "vae.")):
        yield NetworkWeights("vae", path, vae, network_config(path, "vqvae", None), paddle=True)
    if "text_encoder" not in overridden and (text := with_prefix(tensors, "text_encoder.")):
        yield NetworkWeights("text_encoder", path, text, network_config(path, "text_encoder", None), paddle=True)
    others = [name for name in tensors if not name.startswith(tuple(TRAINER_PREFIXES.values()))]
    others = [name for name in others if name.removeprefix("model_ema.") not in dotless]
    if others:
        report.dropped.append(shorten(others))
