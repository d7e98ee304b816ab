"""Write a pipeline folder: model_index.json, unet/, vqvae/, text_encoder/, tokenizer/, scheduler/."""

import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from uvit.data.encoders import quiet
from uvit.diffusion import PredictionType
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler


def save_pipeline(
    folder: Path,
    unet: UViTT2IModel,
    vqvae: AutoencoderKL,
    text_encoder: Any,
    tokenizer: Any,
    latent_scale: float,
    prediction_type: PredictionType,
) -> None:
    """The parts as a folder that `UViTPipeline.from_pretrained` opens; there whole or not at all.

    A pipeline folder that stands there is replaced. Raises UserError where something else does.
    """
    if folder.exists() and not is_replaceable(folder):
        raise UserError(f"{folder}: holds something that is not a pipeline; choose a folder that is new or empty")
    pipeline = UViTPipeline(vqvae, text_encoder, tokenizer, unet, build_scheduler(), latent_scale, prediction_type)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.writing")
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    with quiet():
        pipeline.save_pretrained(aside)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    aside.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "model_index.json").is_file() or not any(folder.iterdir()))
