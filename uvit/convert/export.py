"""A training checkpoint -> a pipeline folder."""

import json
from pathlib import Path

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from uvit import checkpoint
from uvit.config.convert import ConvertConfig
from uvit.data.encoders import load_text_encoder, load_tokenizer, load_vae
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

    Raises UserError where the checkpoint is not whole or an encoder cannot be had.
    """
    found = checkpoint.read(source)
    record = found.record
    has_ema = "ema.safetensors" in record["files"]
    weights = found.load("ema" if use_ema and has_ema else "weights")
    unet = UViTT2IModel(**record["unet_config"])
    load_part(unet, weights, "unet.")
    if record["text_encoder_config"] and text_encoder is None:
        encoder = CLIPTextModel(CLIPTextConfig(**record["text_encoder_config"]))
        load_part(encoder, weights, "text_encoder.")
    else:
        encoder = load_text_encoder(known(text_encoder or record["text_encoder"], "--text_encoder_name_or_path"))
    parts = {
        "vqvae": load_vae(known(vae or record["vae"], "--vae_name_or_path")),
        "tokenizer": load_tokenizer(known(tokenizer or record["tokenizer"], "--tokenizer_name")),
    }
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
        text_encoder=encoder,
        latent_scale=record["latent_scale"],
        prediction_type=record["prediction_type"],
        **parts,
    )
    facts = {key: record[key] for key in ("step", "samples", "config", "versions")} | {"ema": use_ema and has_ema}
    (goal / SOURCE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exported_step(folder: Path) -> int | None:
    """The step of the checkpoint that a pipeline folder was made of, where it says so."""
    try:
        return json.loads((folder / SOURCE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return None


def known(name: str | None, flag: str) -> str:
    if name is None:
        raise UserError(f"{flag}: the run did not know which one made its features; name it")
    return name


def load_part(network: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    network.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    )
