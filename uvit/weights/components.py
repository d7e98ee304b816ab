"""Weights of the official code and of the Paddle port -> the parts of a pipeline, in memory.

A source is a file, a folder with one network, a training checkpoint of either, or the port's whole pipeline folder.
What it is, is told by what it holds. The port's pipeline gives its network labels one too small and decodes with
1/0.18215; a folder of its own is read so that it draws the port's pictures (`PORT`), while weights alone are read as
they were trained (`TRAINED`).
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from uvit.config.model import resolve_model_config
from uvit.diffusion import LATENT_SCALE
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.weights.detect import (
    COMPONENT_OF,
    FLAGS,
    INDEX,
    Network,
    config_beside,
    config_beside_contents,
    is_average,
    is_port_folder,
    is_third_party,
    kind_name,
    part_folders,
    read_config,
    recognise,
    unwrap,
    weight_files,
)
from uvit.weights.encoders import (
    STABLE_DIFFUSION_SCALE,
    WEIGHT_SUFFIXES,
    load_diffusers_vae,
    load_tokenizer,
    load_transformers_encoder,
)
from uvit.weights.files import read_weights
from uvit.weights.report import Report, shorten
from uvit.weights.text_encoder import text_encoder_from_tensors
from uvit.weights.unet import known_config, unet_from_tensors
from uvit.weights.vae import vae_from_tensors

CONVENTIONS = "uvit_conventions.json"  # in others' folders that we wrote: what the model was trained with


@dataclass(frozen=True)
class Conventions:
    """How a U-ViT is to be sampled: see UViTPipeline."""

    latent_scale: float = LATENT_SCALE
    timestep_labels: str = "1..1000"
    prediction_type: str = "epsilon"


TRAINED = Conventions()
PORT = Conventions(STABLE_DIFFUSION_SCALE, "0..999")
Choice = Literal["source", "trained"]


def as_trained(found: Conventions) -> Conventions:
    """The port's pipeline's give way to those of its training; others are those of their training."""
    port = (found.latent_scale, found.timestep_labels) == (PORT.latent_scale, PORT.timestep_labels)
    return replace(TRAINED, prediction_type=found.prediction_type) if port else found


@dataclass
class Components:
    """What a pipeline is made of, as far as the source has it, and the report of how it was read."""

    unet: Any = None
    vqvae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    scheduler_config: dict[str, Any] | None = None  # what scheduler_config.json holds
    conventions: Conventions = TRAINED
    raw_unet: dict[str, Tensor] | None = None  # the weights that `unet` is the average of
    given: Collection[str] = ()  # of these, which flags name: what the source has instead is not read
    facts: dict[str, Any] = field(default_factory=dict)  # of the training, for the model card
    report: Report = field(default_factory=Report)


# Reading


def read_components(
    path: Path,
    use_ema: bool = True,
    config_file: str | None = None,
    conventions: Choice = "source",
    given: Collection[str] = (),
) -> Components:
    """All parts but those `given`. Raises UserError, in one sentence, for what is damaged, mixed, not whole or not
    known.
    """
    parts = Components(given=given)
    if path.is_dir() and (path / INDEX).is_file():
        read_pipeline(path, use_ema, parts)
    elif path.is_dir():
        read_folder(path, use_ema, config_file, parts)
    elif path.exists():
        read_file(path, use_ema, config_file, parts)
    else:
        raise UserError(f"{path}: there is no such file or folder")
    if conventions == "trained":
        parts.conventions = as_trained(parts.conventions)
    if parts.unet is not None:
        told = parts.conventions
        why = "as the port's pipeline has them" if told.timestep_labels == PORT.timestep_labels else "as it was trained"
        parts.report.defaulted.append(
            f"latent scale {told.latent_scale}, timestep labels {told.timestep_labels}, {why}; "
            f"prediction type {told.prediction_type}"
        )
    return parts


def read_pipeline(folder: Path, use_ema: bool, parts: Components) -> None:
    """A pipeline folder: the port's, or one with code of its own, which is not run."""
    index = read_config(folder / INDEX)
    names = {
        name: folder / name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")
    }
    known = {"unet", "vqvae", "text_encoder", "tokenizer", "scheduler"}
    wanted = known - set(parts.given)
    missing = sorted(name for name in wanted if name not in names or not names[name].is_dir())
    if missing:
        raise UserError(f"{folder}: is not whole, it has no {', '.join(missing)}")
    of_port = is_port_folder(folder)
    for name in ("unet", "vqvae", "text_encoder"):
        if name in wanted and (of_port or name == "unet"):
            read_folder(names[name], use_ema, None, parts, name)
    if not of_port:
        load_subfolders(folder, parts, ("vqvae", "text_encoder"))
    load_subfolders(folder, parts, ("tokenizer",))
    parts.scheduler_config = read_config(names["scheduler"] / "scheduler_config.json")
    parts.report.read.append(str(names["scheduler"]))
    left = sorted(set(names) - known)
    if left:
        parts.report.left.append(shorten(left))
    parts.conventions = replace(PORT, prediction_type=parts.scheduler_config.get("prediction_type", "epsilon"))
    if not of_port:
        parts.conventions = Conventions(**{key: index[key] for key in asdict(TRAINED) if key in index})
    else:
        parts.conventions = read_conventions(folder) or parts.conventions


def read_conventions(folder: Path) -> Conventions | None:
    """What we wrote beside weights that say nothing of it."""
    path = folder / CONVENTIONS
    if not path.is_file():
        return None
    content = read_config(path)
    if set(content) != set(asdict(PORT)):
        raise UserError(f"{path}: holds other keys than {', '.join(asdict(PORT))}")
    return Conventions(**content)


def load_subfolders(folder: Path, parts: Components, names: Collection[str]) -> None:
    """Of those that flags do not name, what lies in subfolders, as transformers and diffusers write it."""
    load = {"vqvae": load_vae, "text_encoder": load_text_encoder, "tokenizer": load_tokenizer}
    for name, place in part_folders(folder).items():
        if name in names and name not in parts.given:
            try:
                setattr(parts, name, load[name](str(place)))
            except UserError as error:
                raise UserError(str(error).removeprefix(f"--{FLAGS[name]} ")) from None  # which nobody gave
            parts.report.read.append(str(place))


def read_folder(
    folder: Path, use_ema: bool, config_file: str | None, parts: Components, part: str | None = None
) -> None:
    """A folder of files: one network with its config.json, the official code's checkpoint, the port trainer's.

    Or one with folders of networks, as we write them where they make no pipeline.
    """
    files = weight_files(folder)
    if not files and part is None and (found := part_folders(folder)):
        if "unet" in found:
            read_folder(found["unet"], use_ema, config_file, parts, "unet")
        load_subfolders(folder, parts, ("vqvae", "text_encoder", "tokenizer"))
        return
    averages, plain = [p for p in files if is_average(p)], [p for p in files if not is_average(p)]
    if averages and not plain and not use_ema:
        raise UserError(f"--use_ema False: {folder} has averaged weights only ({shorten([p.name for p in averages])})")
    files = _preferred_format(averages if use_ema and averages else plain or averages) + [
        path for path in plain if "autoencoder" in path.name
    ]
    if not files:
        raise UserError(f"{folder}: holds no weights (files {', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})")
    for path in dict.fromkeys(files):
        read_file(path, use_ema, config_file, parts, part)
    if averages and plain and use_ema and parts.unet is not None:
        _add_raw(_preferred_format(plain), parts)
    if "tokenizer" not in parts.given and part is None and (folder / "vocab.json").is_file():
        parts.tokenizer = load_tokenizer(str(folder))
        parts.report.read.append(f"{folder}: tokenizer")
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path not in weight_files(folder)
    )
    if others:
        parts.report.left.append(f"{folder}: {shorten(others)}")


def _preferred_format(files: list[Path]) -> list[Path]:
    """Of files that hold the same under another suffix, the first kind."""
    kinds = [path.suffix for path in files if path.suffix in (".safetensors", ".pdparams", ".bin")]
    best = min(kinds, key=WEIGHT_SUFFIXES.index, default=None)
    return [path for path in files if path.suffix == best or path.suffix not in (".safetensors", ".pdparams", ".bin")]


def _add_raw(files: list[Path], parts: Components) -> None:
    """The weights that the average was taken of, for formats that hold both."""
    for path in files:
        weights = read_weights(path)
        tensors = unwrap(weights.tensors)
        if recognise(tensors, path) == "uvit":
            unet = unet_from_tensors(tensors, path, dict(parts.unet.config), Report())
            parts.raw_unet = unet.state_dict()
            parts.report.read.append(f"{path}: the weights that are not averaged, kept for formats that hold both")


def read_file(path: Path, use_ema: bool, config_file: str | None, parts: Components, part: str | None = None) -> None:
    """One file of weights; its config is named, or lies beside it, or is told by the shapes.

    part: that of the port's pipeline which it must be.
    """
    weights = read_weights(path)
    tensors = unwrap(weights.tensors)
    kind = recognise(tensors, path)
    kinds = {"safetensors": "safetensors", "pdparams": "Paddle's pickle", "pth": "PyTorch's pickle"}
    parts.report.read.append(f"{path}: {kind_name(kind)}, {len(tensors)} arrays, {kinds[weights.container]}")
    if weights.others:
        parts.report.left.append(
            f"{path}: {len(weights.others)} entries that are no arrays ({shorten(list(weights.others))})"
        )
    if part is not None and COMPONENT_OF[kind] != part:
        raise UserError(f"{path}: is {kind_name(kind)}, where the pipeline's {part} should be")
    if COMPONENT_OF[kind] in parts.given:
        return
    paddle = weights.paddle if weights.paddle is not None else part is not None
    if kind == "trainer":
        read_trainer(tensors, path, use_ema, config_file, parts)
    elif kind == "uvit":
        _require_single(parts.unet, path, "U-ViT")
        parts.conventions = read_conventions(path.parent) or parts.conventions
        parts.unet = unet_from_tensors(tensors, path, _uvit_config(path, config_file), parts.report)
    elif kind == "text_encoder":
        _require_single(parts.text_encoder, path, "text encoder")
        parts.text_encoder = text_encoder_from_tensors(
            tensors, path, config_beside_contents(path, "text_encoder"), parts.report
        )
    else:
        _require_single(parts.vqvae, path, "VAE")
        parts.vqvae = vae_from_tensors(
            tensors, path, config_beside_contents(path, "vqvae"), paddle, kind == "ldm_vae", parts.report
        )


def _require_single(part: Any, path: Path, what: str) -> None:
    if part is not None:
        raise UserError(f"{path}: is a second {what} in this folder; name the file that you mean")


def _uvit_config(path: Path, config_file: str | None) -> dict[str, Any]:
    if config_file is not None:
        return resolve_model_config(config_file)
    beside = config_beside(path, "unet")
    return {} if beside is None else known_config(read_config(beside), beside)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read_trainer(
    tensors: Mapping[str, Tensor], path: Path, use_ema: bool, config_file: str | None, parts: Components
) -> None:
    """The port trainer's one file for everything."""
    if "unet" not in parts.given:
        read_trainers_unet(tensors, path, use_ema, config_file, parts)
    if "vqvae" not in parts.given and (vae := with_prefix(tensors, "vae.")):
        parts.vqvae = vae_from_tensors(vae, path, config_beside_contents(path, "vqvae"), True, False, parts.report)
    if "text_encoder" not in parts.given and (text := with_prefix(tensors, "text_encoder.")):
        parts.text_encoder = text_encoder_from_tensors(
            text, path, config_beside_contents(path, "text_encoder"), parts.report
        )
    dotless = {name.replace(".", "") for name in with_prefix(tensors, "unet.")}
    others = [n for n in tensors if not n.startswith(("unet.", "vae.", "text_encoder."))]
    others = [n for n in others if n.removeprefix("model_ema.") not in dotless]
    if others:
        parts.report.left.append(shorten(others))


def read_trainers_unet(
    tensors: Mapping[str, Tensor], path: Path, use_ema: bool, config_file: str | None, parts: Components
) -> None:
    """Its average has the same names without their dots."""
    report = parts.report
    parts.conventions = read_conventions(path.parent) or parts.conventions
    raw, averages = with_prefix(tensors, "unet."), with_prefix(tensors, "model_ema.")
    dotless = {name.replace(".", ""): name for name in raw}
    ema = {dotless[name]: value for name, value in averages.items() if name in dotless}
    never = bool(ema) and not ema["pos_embed"].any() and bool(raw["pos_embed"].any())
    if never:
        report.left.append("model_ema.*: it was never updated (its pos_embed is still 0), as the port's trainer does")
    taken = use_ema and bool(ema) and not never
    if taken and set(ema) != set(raw):
        raise UserError(
            f"{path}: is not whole, model_ema lacks {shorten(sorted(set(raw) - set(ema)))}; --use_ema False takes "
            "the rest"
        )
    report.read.append(f"{path}: {'the averaged weights, model_ema.*' if taken else 'the weights as trained, unet.*'}")
    parts.unet = unet_from_tensors(ema if taken else raw, path, _uvit_config(path, config_file), report)
    if taken:
        parts.raw_unet = unet_from_tensors(raw, path, dict(parts.unet.config), Report()).state_dict()


# One part of a source


def read_network(path: Path, part: Network) -> Any:
    """A network of a foreign file or folder. Raises UserError where it has none."""
    others = {"unet", *FLAGS} - {part}
    found = getattr(parts := read_components(path, given=others), part)
    if found is None:
        raise UserError(f"{path}: holds no {part} ({'; '.join(parts.report.read)})")
    return found


def load_vae(name_or_path: str) -> Any:
    """Ours, diffusers', the official code's or the port's."""
    return (
        read_network(Path(name_or_path).expanduser(), "vqvae")
        if is_third_party(name_or_path)
        else load_diffusers_vae(name_or_path)
    )


def load_unet(name_or_path: str | Path) -> UViTT2IModel:
    """The U-ViT of a file or folder in any format that `uvit convert` reads: float32, eval mode, frozen.

    `UViTT2IModel.from_pretrained` opens those of diffusers' layout alone. Raises UserError where it holds no U-ViT, or
    is damaged.
    """
    return read_network(Path(name_or_path).expanduser(), "unet")


def load_text_encoder(name_or_path: str) -> Any:
    if is_third_party(name_or_path):
        return read_network(Path(name_or_path).expanduser(), "text_encoder")
    return load_transformers_encoder(name_or_path)


def pipeline_components(name_or_path: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """For `UViTPipeline.from_pretrained`: its arguments where this is of a third party, with `scheduler_config` for the
    scheduler, and those given in place of its own. None: it is a pipeline folder of ours, or a hub id.

    Raises UserError where the source, with what is given, makes no pipeline.
    """
    path = Path(str(name_or_path)).expanduser()
    if not path.exists():
        return None
    loose = path.is_dir() and not (path / INDEX).is_file() and bool(weight_files(path))
    if not loose and not is_third_party(path):
        return None
    parts = read_components(path, given=set(given))
    names = ("vqvae", "text_encoder", "tokenizer", "unet", "scheduler_config")
    modules = {name: given.get(name, getattr(parts, name)) for name in names}
    if "scheduler" in given:
        modules["scheduler"] = given["scheduler"]
        del modules["scheduler_config"]
    missing = [name.removesuffix("_config") for name, module in modules.items() if module is None]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}; pass what is missing, or make a pipeline with `uvit convert`"
        )
    said = parts.conventions
    return modules | {
        "latent_scale": said.latent_scale,
        "timestep_labels": said.timestep_labels,
        "prediction_type": said.prediction_type,
    }
