"""`uvit convert`: a checkpoint, a pipeline or third-party weights -> a pipeline folder, or a third-party format."""

import json
import shlex
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from uvit.checkpoint.folder import (
    RECORD,
    TRAINING_FILE,
    check_command,
    checkpoint_folders,
    read_checkpoint,
    training_facts,
)
from uvit.config.convert import ENCODERS, ConvertConfig
from uvit.config.paths import expand_path
from uvit.conventions import Conventions
from uvit.errors import UserError
from uvit.export.card import PRIVATE_FILES, REPORT_FILE, push, run_folder, write_card
from uvit.export.formats import check_unet, write_official, write_paddle, write_paddlemix, write_trainer
from uvit.export.graph import write_export, write_onnx
from uvit.export.space import MODEL_FOLDER, write_space
from uvit.export.standalone import write_code
from uvit.io import back_up, write_folder_atomically, write_json
from uvit.modern_model import ModernUViTT2IModel
from uvit.sample.fit import FITTED_FILE
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler, scheduler_from_config
from uvit.weights.compatibility import check_components
from uvit.weights.components import (
    CONVENTIONS,
    Components,
    as_trained,
    load_text_encoder,
    load_vae,
    read_components,
)
from uvit.weights.detect import CONFIG, FLAGS, INDEX, is_third_party, missing_components
from uvit.weights.encoders import check_fingerprint, check_finite, fingerprint, load_tokenizer, quiet
from uvit.weights.pipeline_networks import check_unet_weights, load_pipeline_encoders
from uvit.weights.unet import new_unet

PIPELINE_FORMATS = ("pipeline", "diffusers", "space")
WITH_CODE = ("diffusers", "space")
THIRD_PARTY_FORMATS = ("official", "paddle", "port", "trainer")
# The encoders of the official U-ViT code, which made most features that do not name theirs.
USUAL_ENCODERS = {
    "vqvae": "stabilityai/sd-vae-ft-ema",  # Stable Diffusion's VAE, with a decoder that was trained further
    "text_encoder": "openai/clip-vit-large-patch14",
    "tokenizer": "openai/clip-vit-large-patch14",
}


def convert(config: ConvertConfig) -> None:
    """Run the command."""
    source, dest = Path(config.source), Path(config.dest)
    if dest.exists() and not config.overwrite:
        raise UserError(f"{dest}: already exists; choose another folder or pass --overwrite")
    components = load_components(config, source)
    if components.unet is None and (config.to != "pipeline" or config.push_to_hub is not None):
        raise UserError(f"{source}: has no U-ViT, and --to {config.to} needs one ({'; '.join(components.report.read)})")
    if isinstance(components.unet, ModernUViTT2IModel) and config.to in THIRD_PARTY_FORMATS:
        raise UserError(
            f"--to {config.to}: the formats of the official U-ViT code and of PaddleMIX have no place for the modern "
            f"U-ViT of {source}; use --to pipeline, diffusers, export or onnx"
        )
    missing = [FLAGS[name] for name in components.missing() if name in FLAGS]
    is_pipeline = not components.missing()
    if is_pipeline:
        check_fit(components, source)
    if missing and (config.to in WITH_CODE or config.push_to_hub is not None):
        flags = ", ".join(f"--{flag}" for flag in missing)
        raise UserError(f"--to {config.to}: needs a complete pipeline; pass {flags}")
    if config.to in THIRD_PARTY_FORMATS:
        check_unet(components, config.to)
    run = run_folder(source)

    def write(folder: Path) -> None:
        model = folder / MODEL_FOLDER if config.to == "space" else folder
        model.mkdir(exist_ok=True)
        writers: dict[str, Callable[[], None]] = {
            "pipeline": lambda: write_pipeline(components, folder),
            "diffusers": lambda: write_pipeline(components, folder),
            "space": lambda: write_pipeline(components, model),
            "official": lambda: write_official(components, folder, components.facts.get("ema", config.use_ema)),
            "paddle": lambda: write_paddle(components, folder, config.weights),
            "port": lambda: write_paddlemix(components, folder, config.weights),
            "trainer": lambda: write_trainer(components, folder),
            "export": lambda: write_export(components.unet, folder, components.report),
            "onnx": lambda: write_onnx(components.unet, folder, components.report),
        }
        writes_pipeline = config.to in PIPELINE_FORMATS and is_pipeline
        copy_fitted_solvers(components, source, model if writes_pipeline else None)
        writers[config.to]()
        if writes_pipeline:
            name = (config.push_to_hub or dest.name).split("/")[-1]
            write_card(components, model, name, config.license, run, config.to in WITH_CODE)
        if config.to in WITH_CODE:
            write_code(model)
        if config.to == "space":
            for path in PRIVATE_FILES:  # a Space is public
                (model / path).unlink(missing_ok=True)
            write_space(folder, name, config.license)
        if config.to in ("export", "onnx"):  # these hold the network alone
            write_json(folder / CONVENTIONS, asdict(components.conventions))

    try:
        write_folder(dest, config.overwrite, write)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{dest}: cannot be written ({reason}); fix that, or choose another folder") from None
    print(components.report)
    hint = f'; try: uvit sample --pipeline {shlex.quote(str(dest))} "..."' if (dest / INDEX).is_file() else ""
    if config.to in PIPELINE_FORMATS and not is_pipeline:
        flags = f"; pass {', '.join(f'--{flag}' for flag in missing)}" if missing else ""
        hint = f", which is not yet a pipeline: that also needs {', '.join(components.missing())}{flags}"
    if config.to == "space":
        hint = f"; try: pip install gradio, and python {shlex.quote(str(dest / 'app.py'))}"
    print(f"wrote {dest}{hint}")
    if config.push_to_hub is not None:
        print(f"uploaded to {push(dest, config.push_to_hub, config.private, is_space=config.to == 'space')}")


# Reading the source


def load_components(config: ConvertConfig, source: Path) -> Components:
    """The components of any source, with those given by flags in place of its own."""
    flags = (config.vae_name_or_path, config.text_encoder_name_or_path, config.tokenizer_name)
    overridden = [name for name, value in zip(FLAGS, flags, strict=True) if value is not None]
    is_ours = (source / RECORD).is_file() or ((source / INDEX).is_file() and not is_third_party(str(source)))
    if is_ours and config.uvit_config_file is not None:
        raise UserError(f"--uvit_config_file {config.uvit_config_file}: {source} has its own config; remove the flag")
    if (source / RECORD).is_file():
        wanted = [name for name, flag in FLAGS.items() if flag in ENCODERS[config.to]]
        optional = config.to == "official"  # its users already have its autoencoder_kl.pth
        return open_checkpoint(source, config.use_ema, *flags, wanted=wanted, optional=optional)
    if (found := checkpoint_folders(source)) and not (source / CONFIG).is_file():  # a VAE has a config
        raise UserError(f"{source}: is a run folder; give one of its checkpoints, such as {found[-1]}")
    if is_ours:
        if not config.use_ema:
            raise UserError(f"--use_ema False: {source} is a pipeline with one set of weights; give a checkpoint")
        pipeline = open_own_pipeline(source)
        modules = dict(pipeline.components)
        scheduler = modules.pop("scheduler")
        components = Components(**modules, conventions=pipeline.conventions, facts=training_facts(source))
        components.scheduler_config = {"_class_name": type(scheduler).__name__, **scheduler.config}
        if config.conventions == "trained":
            components.conventions = as_trained(components.conventions)
        components.report.read.append(f"{source}: a pipeline")
    else:
        components = read_components(source, config.use_ema, config.uvit_config_file, config.conventions, overridden)
        if config.uvit_config_file is not None and components.unet is None:
            raise UserError(f"--uvit_config_file {config.uvit_config_file}: {source} has no U-ViT; remove the flag")
    vae, text_encoder, tokenizer = flags
    if vae is not None:
        components.vqvae = load_vae(vae)
    if text_encoder is not None:
        components.text_encoder = load_text_encoder(text_encoder)
    if tokenizer is not None:
        components.tokenizer = load_tokenizer(tokenizer)
    components.report.read += [
        f"{name}: --{flag} {value}" for (name, flag), value in zip(FLAGS.items(), flags, strict=True) if value
    ]
    return components


def open_own_pipeline(folder: Path) -> UViTPipeline:
    """A pipeline folder of ours. Raises UserError where it is damaged, or its components do not fit together."""
    if missing := missing_components(folder):
        raise UserError(f"{folder}: is not complete, it has no {', '.join(missing)}")
    try:
        with quiet():
            pipeline = UViTPipeline.from_pretrained(folder, **load_pipeline_encoders(folder, torch.float32))
            check_unet_weights(pipeline.unet, folder)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a wrong value in a config raises errors of any type
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: is not complete, or its components do not fit together ({type(error).__name__}: {reason})"
        ) from None
    for name in ("unet", "vqvae", "text_encoder"):
        if (network := getattr(pipeline, name)) is not None:
            check_finite(network.state_dict(), folder / name)
    return pipeline


def open_checkpoint(
    source: Path,
    use_ema: bool = True,
    vae: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    wanted: Collection[str] = tuple(FLAGS),
    optional: bool = False,
) -> Components:
    """The components of a checkpoint of ours.

    Args:
        vae, text_encoder, tokenizer: replace those that the checkpoint records.
        wanted: the encoders to load.
        optional: without `vae`, a VAE that cannot be loaded is dropped, and the report says why.

    Raises UserError where the checkpoint is not complete, an encoder cannot be loaded, or it is not the one that made
    the features. `vae` is not compared with that one: it may be a VAE with a better decoder.
    """
    found = read_checkpoint(source)
    check_command(found, "uvit train")
    record = found.record
    given = {"vqvae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    needed = [name for name in wanted if given[name] is None and not (name == "vqvae" and optional)]
    if missing := [name for name in missing_encoders(source) if name in needed]:
        flags = " ".join(f"--{FLAGS[name]} {USUAL_ENCODERS[name]}" for name in missing)
        raise UserError(f"{source}: does not record which encoders made its features; pass them, for example {flags}")
    has_ema = use_ema and bool(found.files("ema"))
    weights = found.load("ema" if has_ema else "weights")
    check_finite(weights, source)
    conventions = Conventions.recorded(record)
    components = Components(unet=new_unet(record["unet_config"], **asdict(conventions)), conventions=conventions)
    load_network(components.unet, weights, "unet.")
    components.unet.eval().requires_grad_(False)
    if has_ema:
        raw = found.load("weights")
        check_finite(raw, source)
        components.raw_unet = {name.removeprefix("unet."): v for name, v in raw.items() if name.startswith("unet.")}
    components.report.read.append(f"{source}: step {found.step}, {'EMA weights' if has_ema else 'raw weights'}")
    components.facts = {key: record[key] for key in ("step", "samples", "config", "versions")} | {"ema": has_ema}
    if "text_encoder" in wanted:
        if record["text_encoder_config"] and text_encoder is None:
            components.text_encoder = CLIPTextModel(CLIPTextConfig(**record["text_encoder_config"]))
            load_network(components.text_encoder, weights, "text_encoder.")
            components.facts["text_encoder_sha256"] = fingerprint(components.text_encoder)
        else:
            name = required_encoder(text_encoder or record["text_encoder"], FLAGS["text_encoder"])
            components.text_encoder = load_text_encoder(name)
            expected = record.get("text_encoder_sha256")
            components.facts["text_encoder_sha256"] = check_fingerprint(
                components.text_encoder, expected, FLAGS["text_encoder"], name
            )
    if "vqvae" in wanted and not (conventions.is_pixels and vae is None):
        try:
            load_recorded_vae(components, vae, record)
        except UserError as error:
            if vae is not None or not optional:
                raise
            components.report.dropped.append(f"the VAE: {error}")
    if "tokenizer" in wanted:
        components.tokenizer = load_tokenizer(required_encoder(tokenizer or record["tokenizer"], FLAGS["tokenizer"]))
    return components


def encoders_of_run(source: Path) -> dict[str, Any]:
    """The encoders in the pipeline of a checkpoint's run, if it has one, as arguments of `open_checkpoint`.

    They are there where those that the checkpoint records are not: on another machine, or if the features named none.
    A text encoder that was trained is the checkpoint's own.
    """
    pipeline = source.absolute().parent / "pipeline"
    if not (pipeline / INDEX).is_file():
        return {}
    trains_text = read_checkpoint(source).record.get("text_encoder_config")
    folders = {"vae": "vqvae", "tokenizer": "tokenizer"} | ({} if trains_text else {"text_encoder": "text_encoder"})
    return {name: str(pipeline / part) for name, part in folders.items() if (pipeline / part).is_dir()}


def missing_encoders(source: Path) -> list[str]:
    """The components of a pipeline that a checkpoint neither holds nor names."""
    record = read_checkpoint(source).record
    known = {
        "vqvae": record["vae"],
        "text_encoder": record["text_encoder_config"] or record["text_encoder"],
        "tokenizer": record["tokenizer"],
    }
    is_pixels = Conventions.recorded(record).is_pixels
    return [name for name in FLAGS if known[name] is None and not (name == "vqvae" and is_pixels)]


def convert_command(source: Path, dest: Path, missing: Collection[str] = ()) -> str:
    """The command that makes a pipeline of a checkpoint, with the usual encoders for the missing ones."""
    words = ["uvit", "convert", str(source), str(dest)]
    for name in missing:
        words += [f"--{FLAGS[name]}", USUAL_ENCODERS[name]]
    return shlex.join([*words, "--overwrite"] if dest.exists() else words)


def load_recorded_vae(components: Components, override: str | None, record: dict[str, Any]) -> None:
    name = required_encoder(override or record["vae"], FLAGS["vqvae"])
    vae = load_vae(name)
    expected = None if override else record.get("vae_sha256")
    components.facts["vae_sha256"] = check_fingerprint(vae, expected, FLAGS["vqvae"], name)
    components.vqvae = vae


def required_encoder(name: str | None, flag: str) -> str:
    if name is None:
        raise UserError(f"--{flag}: the checkpoint does not record which one made its features; pass it")
    return expand_path(name, f"--{flag}")  # earlier versions recorded paths as they were typed


def load_network(network: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    network.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    )


def check_fit(components: Components, source: Path) -> None:
    """Raises UserError where the components, all there, do not fit together."""
    try:
        check_components(components.unet, components.vqvae, components.text_encoder, components.tokenizer)
    except ValueError as error:
        raise UserError(f"{source}: the components do not fit together: {error}") from None


def build_pipeline(components: Components) -> UViTPipeline:
    """The pipeline of components that are all there."""
    modules = {name: getattr(components, name) for name in ("unet", *FLAGS)}
    if components.scheduler_config:
        scheduler = scheduler_from_config(components.scheduler_config)
    else:
        shift = components.facts.get("config", {}).get("timestep_shift", 1.0)
        scheduler = build_scheduler(path=components.conventions.path, shift=shift)
    return UViTPipeline(**modules, scheduler=scheduler)


# Writing


def export_checkpoint(source: Path, dest: Path, replace: bool = False) -> None:
    """Write the pipeline folder of a checkpoint. `replace` keeps the old folder under another name.

    Raises UserError as `open_checkpoint` does.
    """
    components = open_checkpoint(source)
    check_fit(components, source)
    components.report.read.clear()  # the pipeline of a run has no conversion to report
    write_folder(dest, replace, lambda folder: write_pipeline(components, folder))


def write_pipeline(components: Components, folder: Path) -> None:
    """Write the folder that `UViTPipeline.from_pretrained` opens; if a component is missing, only its subfolders."""
    modules = {name: getattr(components, name) for name in ("unet", *FLAGS)}
    if components.unet is not None:
        components.unet.register_to_config(**asdict(components.conventions))
    missing = components.missing()
    with quiet():
        if missing:
            for name, module in modules.items():
                if module is not None:
                    module.save_pretrained(folder / name)
        else:
            build_pipeline(components).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:  # a path on this machine
            write_json(path, content)
    if components.facts:
        write_json(folder / TRAINING_FILE, components.facts)
    if components.report.lines():
        write_json(folder / REPORT_FILE, asdict(components.report))


def copy_fitted_solvers(components: Components, source: Path, pipeline: Path | None) -> None:
    """Copy the fitted solvers of a pipeline to one with the same timesteps; else report that they are dropped."""
    if not (source / FITTED_FILE).is_file():
        return
    try:
        timesteps = str(json.loads((source / INDEX).read_text(encoding="utf-8")).get("timestep_labels"))
    except (OSError, ValueError, AttributeError):
        timesteps = None
    if pipeline is not None and timesteps == components.conventions.timestep_labels:
        (pipeline / FITTED_FILE).parent.mkdir(parents=True)
        shutil.copy(source / FITTED_FILE, pipeline / FITTED_FILE)
    else:
        components.report.dropped.append(
            f"{FITTED_FILE}: the solvers fitted to this model; `uvit sample --fit_schedule` fits new ones"
        )


def write_folder(dest: Path, replace: bool, write: Callable[[Path], None]) -> None:
    """Write a folder completely or not at all. `replace` keeps the old folder under another name."""
    if dest.exists() and not replace:
        raise UserError(f"{dest}: already exists")
    with write_folder_atomically(dest) as temporary:
        write(temporary)
        if dest.exists():
            print(f"{dest}: the old folder is now {back_up(dest)}")
