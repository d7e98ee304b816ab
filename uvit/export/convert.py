"""`uvit convert`: a training checkpoint, a pipeline or others' weights -> a pipeline folder, or others' formats."""

import json
import shlex
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from uvit.checkpoint.folder import RECORD, checkpoint_folders, read_checkpoint
from uvit.config.convert import ENCODERS, ConvertConfig
from uvit.errors import UserError
from uvit.export.card import push, run_folder, write_card
from uvit.export.formats import write_official, write_paddle, write_port, write_trainer
from uvit.export.graph import write_export, write_onnx
from uvit.export.standalone import write_code
from uvit.io import back_up, write_folder_atomically, write_json
from uvit.model import UViTT2IModel
from uvit.sample.fit import FITTED_FILE as FITTED
from uvit.sample.pipeline import UViTPipeline, check_components
from uvit.sample.schedulers import build_scheduler, scheduler_from_config
from uvit.weights.components import (
    CONVENTIONS,
    Components,
    Conventions,
    as_trained,
    load_text_encoder,
    load_vae,
    read_components,
)
from uvit.weights.detect import FLAGS, INDEX, is_third_party, missing_parts
from uvit.weights.encoders import check_finite, fingerprint, load_tokenizer, quiet

SOURCE = "training.json"  # in a pipeline folder: which training it comes from
REPORT = "conversion.json"  # in a pipeline folder: what was converted, and how
PIPELINES = ("pipeline", "diffusers")  # the formats that are a pipeline of ours
# The encoders of the official U-ViT code, which made most features that do not name theirs.
USUAL_ENCODERS = {
    "vqvae": "stabilityai/sd-vae-ft-ema",  # Stable Diffusion's, its decoder trained on
    "text_encoder": "openai/clip-vit-large-patch14",
    "tokenizer": "openai/clip-vit-large-patch14",
}


def convert(config: ConvertConfig) -> None:
    """The command."""
    source, goal = Path(config.source).expanduser(), Path(config.dest).expanduser()
    if goal.exists() and not config.overwrite:
        raise UserError(f"{goal}: is there already; choose another folder or pass --overwrite")
    parts = load_components(config, source)
    if parts.unet is None and (config.to != "pipeline" or config.push_to_hub is not None):
        raise UserError(f"{source}: holds no U-ViT, and --to {config.to} needs one ({'; '.join(parts.report.read)})")
    whole = all(getattr(parts, name) is not None for name in FLAGS)
    if whole and parts.unet is not None:
        check_fit(parts, source)
    if not whole and (config.to == "diffusers" or config.push_to_hub is not None):
        missing = ", ".join(f"--{flag}" for name, flag in FLAGS.items() if getattr(parts, name) is None)
        raise UserError(f"--to {config.to}: a whole pipeline is needed; name {missing}")
    run = run_folder(source)

    def write(folder: Path) -> None:
        writers: dict[str, Callable[[], None]] = {
            "pipeline": lambda: write_pipeline(parts, folder),
            "diffusers": lambda: write_pipeline(parts, folder),
            "official": lambda: write_official(parts, folder, config.use_ema and parts.facts.get("ema") is not False),
            "paddle": lambda: write_paddle(parts, folder, config.weights),
            "port": lambda: write_port(parts, folder, config.weights),
            "trainer": lambda: write_trainer(parts, folder),
            "export": lambda: write_export(parts.unet, folder, parts.report),
            "onnx": lambda: write_onnx(parts.unet, folder, parts.report),
        }
        pipeline = config.to in PIPELINES and whole and parts.unet is not None
        carry_fitted(parts, source, folder if pipeline else None)
        writers[config.to]()
        if pipeline:
            name = (config.push_to_hub or goal.name).split("/")[-1]
            write_card(parts, folder, name, config.license, run, config.to == "diffusers")
        if config.to == "diffusers":
            write_code(folder)
        if config.to in ("export", "onnx"):  # the network alone
            write_json(folder / CONVENTIONS, asdict(parts.conventions))

    try:
        write_folder(goal, config.overwrite, write)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{goal}: cannot be written ({reason}); mend that, or name another folder") from None
    print(parts.report)
    print(f"wrote {goal}" + (f'; try: uvit sample --pipeline {goal} "..."' if (goal / INDEX).is_file() else ""))
    if config.push_to_hub is not None:
        print(f"uploaded to {push(goal, config.push_to_hub, config.private)}")


# In


def load_components(config: ConvertConfig, source: Path) -> Components:
    """The parts of whatever the source is, with those that flags name in place of its own."""
    named = (config.vae_name_or_path, config.text_encoder_name_or_path, config.tokenizer_name)
    given = [name for name, value in zip(FLAGS, named, strict=True) if value is not None]
    ours = (source / RECORD).is_file() or ((source / INDEX).is_file() and not is_third_party(str(source)))
    if ours and config.uvit_config_file is not None:
        raise UserError(f"--uvit_config_file {config.uvit_config_file}: {source} says its own config; leave it out")
    if (source / RECORD).is_file():
        wanted = [name for name, flag in FLAGS.items() if flag in ENCODERS[config.to]]
        optional = config.to == "official"  # its file of the VAE is one that its users have
        return open_checkpoint(source, config.use_ema, *named, wanted=wanted, optional=optional)
    if found := checkpoint_folders(source):
        raise UserError(f"{source}: is a training run; name a checkpoint of it, {found[-1]} for example")
    if ours:
        if not config.use_ema:
            raise UserError(f"--use_ema False: {source} is a pipeline, with one set of weights; name a checkpoint")
        pipeline = open_own_pipeline(source)
        said = {name: pipeline.config[name] for name in ("latent_scale", "timestep_labels", "prediction_type")}
        modules = dict(pipeline.components)
        scheduler = modules.pop("scheduler")
        parts = Components(**modules, conventions=Conventions(**said), facts=training_facts(source))
        parts.scheduler_config = {"_class_name": type(scheduler).__name__, **scheduler.config}
        if config.conventions == "trained":
            parts.conventions = as_trained(parts.conventions)
        parts.report.read.append(f"{source}: a pipeline")
    else:
        parts = read_components(source, config.use_ema, config.uvit_config_file, config.conventions, given)
        if config.uvit_config_file is not None and parts.unet is None:
            raise UserError(f"--uvit_config_file {config.uvit_config_file}: {source} holds no U-ViT; leave it out")
    vae, text_encoder, tokenizer = named
    if vae is not None:
        parts.vqvae = load_vae(vae)
    if text_encoder is not None:
        parts.text_encoder = load_text_encoder(text_encoder)
    if tokenizer is not None:
        parts.tokenizer = load_tokenizer(tokenizer)
    parts.report.read += [
        f"{name}: --{flag} {value}" for (name, flag), value in zip(FLAGS.items(), named, strict=True) if value
    ]
    return parts


def open_own_pipeline(folder: Path) -> UViTPipeline:
    """A pipeline of ours. Raises UserError where it is damaged, or its parts are of different models."""
    if missing := missing_parts(folder):
        raise UserError(f"{folder}: is not whole, it has no {', '.join(missing)}")
    try:
        with quiet():
            pipeline = UViTPipeline.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: is not whole, or its parts do not fit ({reason})") from None
    for name in ("unet", "vqvae", "text_encoder"):
        check_finite(getattr(pipeline, name).state_dict(), folder / name)
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
    """The parts of a training checkpoint of ours, with the encoders `wanted` that it knew or that are named.

    optional: an encoder that is not named and cannot be had is left out, and the report says why.

    Raises UserError where the checkpoint is not whole, or an encoder cannot be had or did not make the run's features;
    only a `vae` that is named here is taken as it is, so that one with a better decoder may be.
    """
    found = read_checkpoint(source)
    record = found.record
    averaged = use_ema and bool(found.files("ema"))
    weights = found.load("ema" if averaged else "weights")
    check_finite(weights, source)
    parts = Components(unet=UViTT2IModel(**record["unet_config"]))
    parts.conventions = Conventions(
        record["latent_scale"], record.get("timestep_labels", "1..1000"), record["prediction_type"]
    )
    load_network(parts.unet, weights, "unet.")
    parts.unet.eval().requires_grad_(False)
    if averaged:
        raw = found.load("weights")
        check_finite(raw, source)
        parts.raw_unet = {name.removeprefix("unet."): v for name, v in raw.items() if name.startswith("unet.")}
    parts.report.read.append(f"{source}: step {found.step}, {'averaged weights' if averaged else 'weights as trained'}")
    parts.facts = {key: record[key] for key in ("step", "samples", "config", "versions")} | {"ema": averaged}
    if "text_encoder" in wanted:
        if record["text_encoder_config"] and text_encoder is None:
            parts.text_encoder = CLIPTextModel(CLIPTextConfig(**record["text_encoder_config"]))
            load_network(parts.text_encoder, weights, "text_encoder.")
            parts.facts["text_encoder_sha256"] = fingerprint(parts.text_encoder)
        else:
            name = required_encoder(text_encoder or record["text_encoder"], FLAGS["text_encoder"])
            parts.text_encoder = load_text_encoder(name)
            expected = record.get("text_encoder_sha256")
            parts.facts["text_encoder_sha256"] = check_fingerprint(
                parts.text_encoder, expected, FLAGS["text_encoder"], name
            )
    if "vqvae" in wanted:
        try:
            add_vae(parts, vae, record)
        except UserError as error:
            if vae is not None or not optional:
                raise
            parts.report.left.append(f"the VAE: {error}")
    if "tokenizer" in wanted:
        parts.tokenizer = load_tokenizer(required_encoder(tokenizer or record["tokenizer"], FLAGS["tokenizer"]))
    return parts


def missing_encoders(source: Path) -> list[str]:
    """The components of a pipeline that a checkpoint neither holds nor names."""
    record = read_checkpoint(source).record
    known = {
        "vqvae": record["vae"],
        "text_encoder": record["text_encoder_config"] or record["text_encoder"],
        "tokenizer": record["tokenizer"],
    }
    return [name for name in FLAGS if known[name] is None]


def convert_command(source: Path, goal: Path, missing: Collection[str] = ()) -> str:
    """The command that makes a checkpoint a pipeline, with the usual encoders for the missing ones."""
    words = ["uvit", "convert", str(source), str(goal)]
    for name in missing:
        words += [f"--{FLAGS[name]}", USUAL_ENCODERS[name]]
    return shlex.join([*words, "--overwrite"] if goal.exists() else words)


def add_vae(parts: Components, named: str | None, record: dict[str, Any]) -> None:
    name = required_encoder(named or record["vae"], FLAGS["vqvae"])
    loaded = load_vae(name)
    expected = None if named else record.get("vae_sha256")
    parts.facts["vae_sha256"] = check_fingerprint(loaded, expected, FLAGS["vqvae"], name)
    parts.vqvae = loaded


def required_encoder(name: str | None, flag: str) -> str:
    if name is None:
        raise UserError(f"--{flag}: the run did not know which one made its features; name it")
    return name


def check_fingerprint(module: nn.Module, expected: str | None, flag: str, name: str) -> str:
    """-> the fingerprint of an encoder. Raises UserError where another one made the features; None: not known."""
    found = fingerprint(module)
    if expected is not None and found != expected:
        raise UserError(
            f"--{flag} {name}: is not the one that made the features (fingerprint {found[:12]}, theirs "
            f"{expected[:12]}); name that one, or extract them again with this one"
        )
    return found


def load_network(network: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    network.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    )


def check_fit(parts: Components, source: Path) -> None:
    """Raises UserError where the parts, all there, are of different models."""
    try:
        check_components(parts.unet, parts.vqvae, parts.text_encoder, parts.tokenizer)
    except ValueError as error:
        raise UserError(f"{source}: these parts make no pipeline: {error}") from None


# Out


def export_checkpoint(source: Path, goal: Path, use_ema: bool = True, replace: bool = False) -> None:
    """Write the pipeline folder of a checkpoint; what stood there is kept under another name. As `open_checkpoint`."""
    parts = open_checkpoint(source, use_ema)
    check_fit(parts, source)
    parts.report.read.clear()  # a training that ends says so itself
    write_folder(goal, replace, lambda folder: write_pipeline(parts, folder))


def write_pipeline(parts: Components, folder: Path) -> None:
    """The folder that `UViTPipeline.from_pretrained` opens; where a part is missing, those that are there."""
    modules = {name: getattr(parts, name) for name in ("unet", *FLAGS)}
    missing = [name for name, module in modules.items() if module is None]
    with quiet():
        if missing:
            for name, module in modules.items():
                if module is not None:
                    module.save_pretrained(folder / name)
            flags = ", ".join(f"--{FLAGS[name]}" for name in missing if name in FLAGS)
            parts.report.left.append(f"no {INDEX}, as there is no {', '.join(missing)}; {flags} would make a pipeline")
        else:
            scheduler = scheduler_from_config(parts.scheduler_config) if parts.scheduler_config else build_scheduler()
            UViTPipeline(**modules, scheduler=scheduler, **asdict(parts.conventions)).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:  # a place on this machine
            write_json(path, content)
    if parts.facts:
        write_json(folder / SOURCE, parts.facts)
    if parts.report.lines():
        write_json(folder / REPORT, asdict(parts.report))


def carry_fitted(parts: Components, source: Path, pipeline: Path | None) -> None:
    """The solvers fitted to a pipeline go along into another one of its weights; else the report says so."""
    if not (source / FITTED).is_file():
        return
    try:
        before = str(json.loads((source / INDEX).read_text(encoding="utf-8")).get("timestep_labels"))
    except (OSError, ValueError, AttributeError):
        before = None
    if pipeline is not None and before == parts.conventions.timestep_labels:
        (pipeline / FITTED).parent.mkdir(parents=True)
        shutil.copy(source / FITTED, pipeline / FITTED)
    else:
        parts.report.left.append(
            f"{FITTED}: the solvers fitted to this model; `uvit sample --fit_schedule` fits others"
        )


def write_folder(goal: Path, replace: bool, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all; what stood there is kept under another name."""
    if goal.exists() and not replace:
        raise UserError(f"{goal}: is there already")
    with write_folder_atomically(goal) as aside:
        write(aside)
        if goal.exists():
            print(f"{goal} is now {back_up(goal)}")


def training_facts(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of the training that it comes from; empty where it says nothing."""
    try:
        facts = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
