"""The components of a pipeline, in memory, from weights of any origin.

The journey of a PaddleMIX folder or a `.pdparams`:

    networks.locate         where each component lies                  [Location]
    networks.read_networks  the arrays there (files.py, pdparams.py)   [NetworkWeights]
    build_network           arrays -> networks (unet.py, vae.py, text_encoder.py)
    Components              the networks, the tokenizer, the scheduler's config, and the report

PaddleMIX's pipeline passes timesteps that are one too small and decodes with 1/0.18215. Its folder is read so that it
generates the same images as there (`PADDLEMIX`). Weights without a pipeline get the conventions of training
(`TRAINED`).
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from uvit.config.paths import expand_path
from uvit.conventions import Conventions, recorded_conventions
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.weights.detect import (
    COMPONENT_FOLDERS,
    CONFIG,
    FLAGS,
    INDEX,
    Network,
    component_folders,
    config_beside,
    is_paddlemix_folder,
    is_third_party,
    listed_components,
    read_config,
    weight_files,
)
from uvit.weights.encoders import (
    STABLE_DIFFUSION_SCALE,
    load_diffusers_vae,
    load_tokenizer,
    load_transformers_encoder,
)
from uvit.weights.networks import Location, NetworkWeights, locate, read_networks
from uvit.weights.report import Report, shorten
from uvit.weights.text_encoder import text_encoder_from_tensors
from uvit.weights.unet import model_config, unet_from_tensors
from uvit.weights.vae import vae_from_tensors

CONVENTIONS = "uvit_conventions.json"  # `uvit convert` writes it beside weights in other formats


TRAINED = Conventions()
PADDLEMIX = Conventions(STABLE_DIFFUSION_SCALE, timestep_labels="0..999")
ConventionsChoice = Literal["source", "trained"]


def as_trained(conventions: Conventions) -> Conventions:
    """The conventions of training in place of those of PaddleMIX's pipeline; others stay."""
    if replace(conventions, prediction_type=PADDLEMIX.prediction_type, path=PADDLEMIX.path) != PADDLEMIX:
        return conventions
    return replace(TRAINED, prediction_type=conventions.prediction_type, path=conventions.path)


@dataclass
class Components:
    """What a pipeline is made of, as far as the source has it.

    Attributes:
        scheduler_config: the content of scheduler_config.json.
        raw_unet: the raw weights, where `unet` has the EMA weights and the source has both.
        facts: about the training run, for the model card.
        report: how the source was read and converted.
    """

    unet: Any = None
    vqvae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    scheduler_config: dict[str, Any] | None = None
    conventions: Conventions = TRAINED
    raw_unet: dict[str, Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    report: Report = field(default_factory=Report)

    def missing(self) -> list[str]:
        """The parts of a pipeline that are not there. A model on pixels needs no VAE."""
        names = [name for name in ("unet", *FLAGS) if getattr(self, name) is None]
        return [name for name in names if name != "vqvae" or not self.conventions.is_pixels]


# All components of a source


def read_components(
    path: Path,
    use_ema: bool = True,
    config_file: str | None = None,
    conventions: ConventionsChoice = "source",
    overridden: Collection[str] = (),
) -> Components:
    """The components of a source, except those `overridden` by flags.

    Raises UserError where the source is damaged, incomplete or unknown.
    """
    report = Report()
    found: dict[str, Any] = {}
    raw_unet = None
    facts: dict[str, Any] = {}
    own_conventions, is_assumed = TRAINED, False
    for location in locate(path, overridden):
        if location.saved_by_library:
            found[str(location.component)] = load_saved(location)
            report.read.append(f"{location.path}: {location.component}")
            continue
        for weights in read_networks(location, use_ema, config_file, overridden, report):
            if weights.is_raw:
                weights = replace(weights, config=model_config(found["unet"]))
                raw_unet = build_network(weights, Report()).state_dict()
                continue
            if weights.component in found:
                raise UserError(f"{weights.path}: is a second {weights.component} in this folder; name one file")
            found[weights.component] = build_network(weights, report)
            if weights.component == "unet":
                facts = {} if weights.is_ema is None else {"ema": weights.is_ema}
                recorded = read_conventions(weights.path)
                own_conventions, is_assumed = recorded or TRAINED, recorded is None
    scheduler_config = None
    if (path / INDEX).is_file():
        scheduler_config, own_conventions = read_pipeline_settings(path, overridden, report)
        is_assumed = False
    if conventions == "trained":
        own_conventions = as_trained(own_conventions)
    if "unet" in found:
        found["unet"].register_to_config(**asdict(own_conventions))
        paddlemix = own_conventions.timestep_labels == PADDLEMIX.timestep_labels
        report.defaulted.append(
            f"{own_conventions.describe_latents()}, timesteps {own_conventions.timestep_labels}, "
            f"as in {'the PaddleMIX pipeline' if paddlemix else 'training'}; "
            f"prediction type {own_conventions.prediction_type}"
            + f"; {CONVENTIONS} beside the weights changes them"
            * is_assumed
        )
    return Components(
        **found,
        scheduler_config=scheduler_config,
        conventions=own_conventions,
        raw_unet=raw_unet,
        facts=facts,
        report=report,
    )


def build_network(weights: NetworkWeights, report: Report) -> Any:
    """Pass two: a network of its weights; float32, eval mode, frozen."""
    tensors, path, config = weights.tensors, weights.path, weights.config
    if weights.component == "unet":
        return unet_from_tensors(tensors, path, config or {}, report)
    if weights.component == "text_encoder":
        return text_encoder_from_tensors(tensors, path, config, report)
    return vae_from_tensors(tensors, path, config, weights.paddle, weights.kind == "ldm_vae", report)


def load_saved(location: Location) -> Any:
    """What diffusers or transformers saved."""
    load = {"vqvae": load_vae, "text_encoder": load_text_encoder, "tokenizer": load_tokenizer}
    component = str(location.component)
    try:
        return load[component](str(location.path))
    except UserError as error:
        raise UserError(str(error).removeprefix(f"--{FLAGS[component]} ")) from None  # the user did not pass this flag


def read_pipeline_settings(
    folder: Path, overridden: Collection[str], report: Report
) -> tuple[dict[str, Any], Conventions]:
    """The config of a pipeline's scheduler, and its conventions."""
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler_config: dict[str, Any] = {}
    if path.is_file() or "scheduler" not in overridden:
        scheduler_config = read_config(path)
        report.read.append(str(path.parent))
    unknown = sorted(set(listed_components(folder)) - {*COMPONENT_FOLDERS, "scheduler"})
    if unknown:
        report.dropped.append(shorten(unknown))
    if is_paddlemix_folder(folder):
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        return scheduler_config, read_conventions(folder / INDEX) or replace(PADDLEMIX, prediction_type=prediction_type)
    return scheduler_config, _recorded(folder / "unet" / CONFIG) or _recorded(folder / INDEX) or TRAINED


def read_conventions(weights: Path) -> Conventions | None:
    """The conventions beside weights: what `uvit convert` wrote for a format that cannot hold them, or the config of
    the U-ViT. None: they are not recorded."""
    path = weights.with_name(CONVENTIONS)
    if not path.is_file():
        config = config_beside(weights, "unet")
        return None if config is None else _recorded(config)
    content, keys = read_config(path), list(asdict(TRAINED))
    older = {"latent_scale", "timestep_labels", "prediction_type"}
    if not older <= set(content) <= set(keys):
        raise UserError(f"{path}: must have the keys {', '.join(keys)} and no others")
    return _recorded(path)


def _recorded(path: Path) -> Conventions | None:
    """Those in a JSON file, or None if it has none of them. Raises UserError where a value is wrong."""
    content = read_config(path) if path.is_file() else {}
    try:
        return Conventions.recorded(content) if recorded_conventions(content) else None
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct it") from None


# One component of a source


def load_vae(name_or_path: str) -> Any:
    """A VAE in diffusers' format (by folder or Hub id), or in one of the official U-ViT code or PaddleMIX."""
    if is_third_party(name_or_path, "vqvae"):
        return read_network(Path(name_or_path), "vqvae")
    return load_diffusers_vae(name_or_path)


def load_unet(name_or_path: str | Path) -> UViTT2IModel:
    """The U-ViT of a file or folder in any format that `uvit convert` reads: float32, eval mode, frozen.

    `UViTT2IModel.from_pretrained` opens the layout of diffusers only. Raises UserError where the source has no U-ViT,
    or is damaged.
    """
    return read_network(Path(expand_path(str(name_or_path), "load_unet")), "unet")


def load_text_encoder(name_or_path: str) -> Any:
    """A text encoder in transformers' format (by folder or Hub id), or PaddleMIX's."""
    if is_third_party(name_or_path, "text_encoder"):
        return read_network(Path(name_or_path), "text_encoder")
    return load_transformers_encoder(name_or_path)


def read_network(path: Path, component: Network) -> Any:
    """One network of a source. Prints what is assumed of an encoder. Raises UserError where it has none of its kind."""
    if component != "unet" and (path / INDEX).is_file() and not is_paddlemix_folder(path):
        path = component_folders(path).get(component, path)
    components = read_components(path, overridden={"unet", *FLAGS} - {component})
    network = getattr(components, component)
    if network is None:
        raise UserError(f"{path}: has no {component}; it holds: {'; '.join(components.report.read) or 'nothing else'}")
    for line in components.report.defaulted if component != "unet" else ():
        print(f"{path}: {line}")
    return network


# For UViTPipeline.from_pretrained


def pipeline_components(name_or_path: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of UViTPipeline for a third-party source, with those `given` in place of its own.

    `scheduler_config` stands for the scheduler, unless one is given. None: this is a pipeline folder of ours, or a Hub
    id. Raises UserError where the source, with what is given, makes no pipeline.
    """
    path = Path(expand_path(str(name_or_path), "from_pretrained"))
    if not path.exists():
        return None
    without_index = path.is_dir() and not (path / INDEX).is_file() and bool(weight_files(path))
    if not without_index and not is_third_party(path):
        return None
    components = read_components(path, overridden=set(given))
    names = ("vqvae", "text_encoder", "tokenizer", "unet", "scheduler_config")
    modules = {name: given.get(name, getattr(components, name)) for name in names}
    if "scheduler" in given:
        modules["scheduler"] = given["scheduler"]
        del modules["scheduler_config"]
    missing = [name.removesuffix("_config") for name, module in modules.items() if module is None]
    if components.conventions.is_pixels:
        missing = [name for name in missing if name != "vqvae"]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; pass them, or make a pipeline with `uvit convert`")
    return modules | asdict(components.conventions)
