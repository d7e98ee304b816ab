"""What a store can say of the encoders that features in the old layout were made with."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from uvit.config.store import FeaturesImportConfig
from uvit.convert.folder import load_text_encoder_of_any, load_vae_of_any
from uvit.data.encoders import (
    downsampling_of,
    fingerprint,
    latent_scale_of,
    load_tokenizer,
)
from uvit.diffusion import LATENT_SCALE
from uvit.errors import UserError

Encoder = dict[str, str]  # {"name", "sha256"}


@dataclass(frozen=True)
class Recorded:
    """None: nobody said."""

    vae: Encoder | None
    text_encoder: Encoder | None
    tokenizer: Encoder | None
    latent_scale: float
    resolution: int | None  # side of the images in pixels


def recorded_encoders(
    config: FeaturesImportConfig, moments_shape: tuple[int, ...], context_shape: tuple[int, ...]
) -> Recorded:
    """What the flags name, with its fingerprint. Raises UserError where one does not fit the features."""
    vae = text_encoder = tokenizer = resolution = None
    latent_scale = LATENT_SCALE
    if config.vae_name_or_path:
        model = load_vae_of_any(config.vae_name_or_path)
        if 2 * model.config["latent_channels"] != moments_shape[0]:
            raise UserError(
                f"--vae_name_or_path {config.vae_name_or_path}: has {model.config['latent_channels']} latent channels,"
                f" and the moments' shape {moments_shape} is for {moments_shape[0] // 2}; give the one they came from"
            )
        vae = _record(config.vae_name_or_path, fingerprint(model))
        latent_scale = latent_scale_of(model)
        resolution = moments_shape[1] * downsampling_of(model)
    if config.text_encoder_name_or_path:
        model = load_text_encoder_of_any(config.text_encoder_name_or_path)
        if model.config.hidden_size != context_shape[1]:
            raise UserError(
                f"--text_encoder_name_or_path {config.text_encoder_name_or_path}: is {model.config.hidden_size} wide,"
                f" and the contexts have shape {context_shape}; give the one they came from"
            )
        text_encoder = _record(config.text_encoder_name_or_path, fingerprint(model))
    if name := config.tokenizer_name or config.text_encoder_name_or_path:
        vocabulary = json.dumps(sorted(load_tokenizer(name).get_vocab().items())).encode()
        tokenizer = _record(name, hashlib.sha256(vocabulary).hexdigest())
    return Recorded(vae, text_encoder, tokenizer, config.latent_scale or latent_scale, resolution)


def _record(name_or_path: str, sha256: str) -> Encoder:
    """Local folders by their absolute names; hub ids and built-in names as they are."""
    path = Path(name_or_path).expanduser()
    return {"name": str(path.resolve()) if path.exists() else name_or_path, "sha256": sha256}
