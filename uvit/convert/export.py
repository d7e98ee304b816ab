"""A training checkpoint -> a pipeline folder."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from uvit import checkpoint
from uvit.config.convert import ConvertConfig
from uvit.data.encoders import fingerprint, load_text_encoder, load_tokenizer, load_vae
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.sample.export import save_pipeline

SOURCE = "training.json"  # in a pipeline folder: which training it comes from


def convert(config: ConvertConfig) -> None:
    """The command."""
    goal = Path(config.dest)
    if goal.exists() and not config.overwrite:
        raise UserError(f"{goal}: is there already; choose another folder or pass --overwrite")
    export_checkpoint(
        Path(config.source),
        goal,
        use_ema=config.use_ema,
        replace=config.overwrite,
        vae=config.vae_name_or_path,
        text_encoder=config.text_encoder_name_or_path,
        tokenizer=config.tokenizer_name,
    )
    print(f'wrote {goal}; try: uvit sample --pipeline {goal} "..."')


def export_checkpoint(
    source: Path,
    goal: Path,
    use_ema: bool = True,
    replace: bool = False,
    vae: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Write the pipeline folder `goal`; what stood there is kept under another name.

    Raises UserError where the checkpoint is not whole, or an encoder cannot be had or did not make the run's features;
    only a `vae` that is named here is taken as it is, so that one with a better decoder may be.
    """
    found = checkpoint.read(source)
    record = found.record
    weights = found.load("ema" if use_ema and found.files("ema") else "weights")
    unet = UViTT2IModel(**record["unet_config"])
    load_part(unet, weights, "unet.")
    if record["text_encoder_config"] and text_encoder is None:
        encoder = CLIPTextModel(CLIPTextConfig(**record["text_encoder_config"]))
        load_part(encoder, weights, "text_encoder.")
        text_encoder_sha256 = fingerprint(encoder)
    else:
        name = known(text_encoder or record["text_encoder"], "text_encoder_name_or_path")
        encoder = load_text_encoder(name)
        expected = record.get("text_encoder_sha256")
        text_encoder_sha256 = check_fingerprint(encoder, expected, "text_encoder_name_or_path", name)
    name = known(vae or record["vae"], "vae_name_or_path")
    vqvae = load_vae(name)
    expected = None if vae else record.get("vae_sha256")
    vae_sha256 = check_fingerprint(vqvae, expected, "vae_name_or_path", name)
    loaded_tokenizer = load_tokenizer(known(tokenizer or record["tokenizer"], "tokenizer_name"))
    aside = None
    if goal.exists():
        if not replace:
            raise UserError(f"{goal}: is there already")
        aside = next(p for i in range(1, 10000) if not (p := goal.with_name(f"{goal.name}.old{i}")).exists())
        goal.rename(aside)
        print(f"{goal} is now {aside}")
    save_pipeline(
        goal,
        unet=unet,
        vqvae=vqvae,
        text_encoder=encoder,
        tokenizer=loaded_tokenizer,
        latent_scale=record["latent_scale"],
        prediction_type=record["prediction_type"],
    )
    facts = {key: record[key] for key in ("step", "samples", "config", "versions")} | {
        "ema": use_ema and bool(found.files("ema")),
        "vae_sha256": vae_sha256,
        "text_encoder_sha256": text_encoder_sha256,
    }
    (goal / SOURCE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exported_facts(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of the training that it comes from; empty where it says nothing."""
    try:
        facts = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def known(name: str | None, flag: str) -> str:
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


def load_part(network: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    network.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    )
