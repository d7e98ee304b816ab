"""Pass one of reading weights: the arrays of each network in a source.

`locate` says where the components of a source lie. `read_networks` reads the arrays there, and gives one
`NetworkWeights` for each network. `components.py` is pass two: it builds the networks from them.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.weights.detect import (
    COMPONENT_FOLDERS,
    COMPONENT_OF,
    HALF,
    INDEX,
    KIND_NAMES,
    FoundNetwork,
    Network,
    WeightsKind,
    component_folders,
    find_networks,
    is_ema_file,
    is_paddlemix_folder,
    left_out_components,
    listed_components,
    network_config,
    unwrap,
    weight_files,
)
from uvit.weights.encoders import WEIGHT_SUFFIXES
from uvit.weights.files import SHARD, read_weights
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
        is_ema: whether these are EMA weights. None: the source does not say.
    """

    kind: WeightsKind
    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] | None = None
    paddle: bool = False
    is_raw: bool = False
    is_ema: bool | None = None

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
    listed = [name for name in listed_components(folder) if (folder / name).is_dir()]
    folders = {component: each for component, each in component_folders(folder).items() if each.name in listed}
    needed = {*COMPONENT_FOLDERS, "scheduler"} - {*overridden} - left_out_components(folder)
    missing = sorted(needed - folders.keys() - {*listed})
    if missing:
        raise UserError(f"{folder}: is not complete, it has no {', '.join(missing)}")
    paddlemix = is_paddlemix_folder(folder)
    by_library = {"unet": False, "vqvae": not paddlemix, "text_encoder": not paddlemix, "tokenizer": True}
    return [Location(folders[name], name, by_library[name]) for name in COMPONENT_FOLDERS if name in folders]


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
    if location.component is not None and (twin := folder.with_name(f"{folder.name}_ema")).is_dir():
        ema = ema or weight_files(twin)  # diffusers' training scripts keep EMA weights in a folder of their own
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
    if others := [name for name in others if not SHARD.fullmatch(name)]:
        report.dropped.append(f"{folder}: {shorten(others)}")


def _preferred_format(files: list[Path]) -> list[Path]:
    """Without files that hold the same in another format, or in half precision."""
    files = [path for path in files if not HALF.search(path.name)] or files
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
    tensors = unwrap(content.tensors, path)
    found = find_networks(tensors, path)
    containers = {"safetensors": "safetensors", "pdparams": "a Paddle pickle", "pth": "a PyTorch pickle"}
    if others := content.other_entries:
        report.dropped.append(f"{path}: entries that are not arrays: {shorten(list(others))}")
    used = {network.prefix + name for network in found for name in network.tensors}
    ema = tuple(network.prefix for network in found if network.is_ema)  # its names may not be those of the file
    if left := [name for name in tensors if name not in used and not name.startswith(ema)]:
        report.dropped.append(f"{path}: arrays of no network: {shorten(left)}")
    if component is not None and component not in {COMPONENT_OF[network.kind] for network in found}:
        raise UserError(f"{path}: is {KIND_NAMES[found[0].kind]}, where the pipeline's {component} should be")
    for name in dict.fromkeys(COMPONENT_OF.values()):
        candidates = [network for network in found if COMPONENT_OF[network.kind] == name]
        if candidates and (name in overridden or component not in (None, name)):
            report.read.append(f"{path}: {KIND_NAMES[candidates[0].kind]}, which is not used")
        if not candidates or name in overridden or component not in (None, name):
            continue
        network, raw = _choose(candidates, path, use_ema, report)
        is_ema = network.is_ema or _is_ema_by_name(path, len(candidates))
        if name == "unet" and is_ema and not use_ema:
            raise UserError(f"--use_ema False: {path} has EMA weights only")
        which = "the EMA weights, " if network.is_ema else "the raw weights, " if len(candidates) > 1 else ""
        where = f" of {network.prefix}*" if network.prefix else ""
        what = f"{KIND_NAMES[network.kind]}, {which}{len(network.tensors)} arrays{where}"
        report.read.append(f"{path}: {what}, {containers[content.container]}")
        config = network_config(path, cast(Network, name), config_file)
        paddle = content.paddle if content.paddle is not None else component is not None
        yield NetworkWeights(network.kind, path, network.tensors, config, paddle, is_ema=is_ema)
        if raw is not None and name == "unet":
            yield NetworkWeights("uvit", path, raw.tensors, is_raw=True)


def _is_ema_by_name(path: Path, num_candidates: int) -> bool | None:
    """What the name of a file says of the weights in it, where the names of the arrays do not."""
    if num_candidates > 1 or path.stem == "nnet":  # the official U-ViT code keeps raw weights in nnet.pth
        return False
    return True if is_ema_file(path) else None


def _choose(
    candidates: list[FoundNetwork], path: Path, use_ema: bool, report: Report
) -> tuple[FoundNetwork, FoundNetwork | None]:
    """Of one component in a file: the network to take, and the raw weights beside it if that is the EMA."""
    averages = [network for network in candidates if network.is_ema]
    ema = _only_one(averages if use_ema else averages[:1], path)
    raw = _only_one([network for network in candidates if not network.is_ema], path)
    if raw is None:
        assert ema is not None
        if not use_ema:
            raise UserError(f"--use_ema False: {path} has EMA weights only ({ema.prefix}*)")
        return ema, None
    if ema is not None and all("pos_embed" in network.tensors for network in (ema, raw)):
        updated = ema.tensors["pos_embed"].any() or not raw.tensors["pos_embed"].any()
        if not updated:
            report.dropped.append(
                f"{ema.prefix}*: the EMA was never updated (its pos_embed is still 0), a bug of the PaddleMIX trainer"
            )
            ema = None
    if not use_ema or ema is None:
        return raw, None
    parameters = {name for name, value in raw.tensors.items() if value.is_floating_point()}
    if missing := sorted(parameters - set(ema.tensors)):
        raise UserError(
            f"{path}: is not complete, {ema.prefix}* lacks {shorten(missing)}; --use_ema False takes the raw weights"
        )
    return replace(ema, tensors={**raw.tensors, **ema.tensors}), raw


def _only_one(networks: list[FoundNetwork], path: Path) -> FoundNetwork | None:
    """The network, where there is one, or several that are the same."""
    first = networks[0] if networks else None
    for network in networks[1:]:
        assert first is not None
        same = first.tensors.keys() == network.tensors.keys()
        if not same or not all(torch.equal(first.tensors[name], value) for name, value in network.tensors.items()):
            raise UserError(
                f"{path}: holds several networks of one kind ({shorten([f'{n.prefix}*' for n in networks])}); keep one "
                "of them in the file"
            )
    return first


def _read_raw(files: list[Path], report: Report) -> Iterator[NetworkWeights]:
    """The raw weights beside a file of EMA weights, for formats that hold both."""
    for path in files:
        found = find_networks(unwrap(read_weights(path).tensors, path), path)
        if raw := _only_one([network for network in found if network.kind == "uvit" and not network.is_ema], path):
            report.read.append(f"{path}: the raw weights, kept for formats that hold both")
            yield NetworkWeights("uvit", path, raw.tensors, is_raw=True)
