"""Checks before the first step: features, model, flags and encoders must fit one another."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvit.checkpoint.folder import training_facts
from uvit.config.train import TrainConfig
from uvit.conventions import LatentSpace
from uvit.errors import UserError, differences
from uvit.model import UViTT2IModel
from uvit.store.types import Features
from uvit.weights.compatibility import check_components
from uvit.weights.components import TRAINED, load_text_encoder, load_vae
from uvit.weights.detect import FLAGS, first_that_has
from uvit.weights.encoders import check_fingerprint, is_local_path, load_tokenizer

NUM_LATENTS = 64  # samples that are read before a run
USUAL_STD = (0.25, 4.0)  # of scaled latents


def check_features(
    config: TrainConfig, features: Features, unet: UViTT2IModel, use_tokens: bool, flag: str, path: str
) -> None:
    """Raises UserError if the features do not fit the model and the flags. `--flag path` is where the features are."""
    model = unet.config
    where = f"--{flag} {path}"
    channels, height, width = features.latents_shape
    what = "images" if features.is_pixels else "latents"
    if channels != model.in_channels:
        raise UserError(
            f"{where}: its {what} have {channels} channels, and the model's have {model.in_channels}; "
            "choose another --uvit_config_file"
        )
    rows, columns = unet.grid
    p = unet.patch_size
    if height % p or width % p or height // p > rows or width // p > columns:
        raise UserError(
            f"{where}: its {what} are {height}x{width}, and the model's sample_size is {rows * p}x{columns * p}; "
            "choose another --uvit_config_file"
        )
    if use_tokens:
        num_tokens, what = features.num_tokens, "token ids"
        if features.empty_token_ids is None:
            reason = (
                "which --train_text_encoder needs" if config.train_text_encoder else "but the training features have"
            )
            raise UserError(f"{where}: has no token ids, {reason}; extract with --text tokens or both")
    else:
        if features.context_shape is None:
            raise UserError(
                f"{where}: has no text embeddings, but the training features have; extract with --text contexts"
            )
        num_tokens, clip_dim = features.context_shape
        what = "text embeddings"
        if clip_dim != model.clip_dim:
            raise UserError(
                f"{where}: its text embeddings have width {clip_dim}, and the model's clip_dim is {model.clip_dim}; "
                "choose another --uvit_config_file"
            )
    if num_tokens != model.num_text_tokens:
        raise UserError(
            f"{where}: has {num_tokens} {what} per caption, and the model's num_text_tokens is "
            f"{model.num_text_tokens}; extract with --model_max_length {model.num_text_tokens}"
        )
    if config.model_max_length not in (None, num_tokens):
        raise UserError(
            f"--model_max_length {config.model_max_length}: the features have {num_tokens} tokens per caption ({where})"
        )
    if config.resolution is not None and features.resolution not in (None, config.resolution):
        raise UserError(
            f"--resolution {config.resolution}: the features were extracted at {features.resolution} ({where})"
        )


def fingerprints(features: Features, train_text_encoder: bool) -> dict[str, str | None]:
    """{what: sha256} of what made the features, which must not change in a run; None: unknown.

    A text encoder that is trained in the run does not count.
    """
    return {
        "VAE": features.vae_sha256,
        "text encoder": None if train_text_encoder else features.text_encoder_sha256,
        "tokenizer": features.tokenizer_sha256,
    }


def differing_fingerprints(
    before: Mapping[str, str | None], now: Mapping[str, str | None], words: tuple[str, str] = ("was", "now")
) -> list[str]:
    """A line for each fingerprint that is known on both sides and differs."""
    known = [what for what, mine in now.items() if mine and before.get(what)]
    one, other = ({f"fingerprint of the {what}": each[what] for what in known} for each in (before, now))
    return list(differences(one, other, words).values())


def check_validation(config: TrainConfig, features: Features, validation: Features, flag: str, path: str) -> None:
    """Raises UserError if other encoders made the features to validate on than made the features to train on."""
    if features.is_pixels != validation.is_pixels:
        kinds = ["pixels" if either.is_pixels else "latents" for either in (validation, features)]
        raise UserError(
            f"--{flag} {path}: its split {config.validation_split} holds {kinds[0]}, and the training features "
            f"{kinds[1]}; extract it with the same --latents"
        )
    ours, theirs = (fingerprints(either, config.train_text_encoder) for either in (features, validation))
    if found := differing_fingerprints(ours, theirs, ("of the training features", "of these")):
        raise UserError(
            f"--{flag} {path}: its split {config.validation_split} was made by other encoders than the training "
            "features; extract it with the same ones",
            found,
        )


def check_pretrained(config: TrainConfig, features: Features) -> None:
    """Raises UserError if the encoders of the pipeline to start from did not make the features."""
    name = config.pretrained_model_name_or_path
    if name is None:
        return
    facts = training_facts(Path(name))
    trained = TRAINED.timestep_labels
    if (labels := facts.get("timestep_labels", trained)) != trained:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: was trained with timesteps {labels}, but this training uses "
            f"{trained}; start from another pipeline"
        )
    theirs = {"VAE": facts.get("vae_sha256"), "text encoder": facts.get("text_encoder_sha256")}
    ours = fingerprints(features, config.train_text_encoder)
    if found := differing_fingerprints(theirs, ours, ("of the pipeline", "of the features")):
        raise UserError(
            f"--pretrained_model_name_or_path {name}: its encoders did not make the features; extract the features "
            "with them, or start from another pipeline",
            found,
        )


def check_named_encoders(config: TrainConfig, features: Features, unet: UViTT2IModel) -> None:
    """Load what flags name for the previews and the final pipeline. Raises UserError if it cannot be part of those.

    What the features name is loaded when it is needed: it may not be on the machine that trains. Neither may a Hub id:
    then a warning is printed.
    """
    made_by = dict(zip(FLAGS, fingerprints(features, config.train_text_encoder).values(), strict=True))
    load: dict[str, Callable[[str], Any]] = {
        "vqvae": load_vae, "text_encoder": load_text_encoder, "tokenizer": load_tokenizer
    }  # fmt: skip
    found = dict.fromkeys(FLAGS)
    for component, flag in FLAGS.items():
        if component == "vqvae" and features.is_pixels:
            if config.vae_name_or_path is not None:
                raise UserError(
                    f"--vae_name_or_path {config.vae_name_or_path}: --feature_path {config.feature_path} holds pixels, "
                    "which need no VAE; leave it out"
                )
            continue
        name = first_that_has(component, config.pretrained_model_name_or_path, getattr(config, flag))
        flag = "pretrained_model_name_or_path" if name == config.pretrained_model_name_or_path else flag
        if name is None or (component == "text_encoder" and config.train_text_encoder):  # that one is checked anyway
            continue
        try:
            found[component] = load[component](name)
        except UserError as error:
            if is_local_path(name) or Path(name).exists():
                raise
            print(f"warning: {error}; without it, no pipeline can be written at the end")
            continue
        check_fingerprint(found[component], made_by[component], flag, name)
        check_sizes(unet, flag, name, **found)


def check_sizes(
    unet: UViTT2IModel, flag: str, name: str, vqvae: Any = None, text_encoder: Any = None, tokenizer: Any = None
) -> None:
    """Raises UserError, which names a component by its flag, if the U-ViT and the components do not fit together."""
    try:
        check_components(unet, vqvae, text_encoder, tokenizer)
    except ValueError as error:
        raise UserError(f"--{flag} {name}: {error}; choose another, or another --uvit_config_file") from None


def check_latents(features: Features, space: LatentSpace, path: str) -> None:
    """Print a warning if the standard deviation of the scaled latents is far from 1, that of the noise.

    That of images in [-1, 1] may be anything but 0: nothing scales them.
    """
    rows = np.linspace(0, features.num_samples - 1, min(NUM_LATENTS, features.num_samples)).astype(np.int64)
    stored = features.read(rows, np.zeros(len(rows))).latents().astype(np.float64)
    with np.errstate(invalid="ignore"):  # of what is not finite
        std = float(np.std(space.normalize(torch.from_numpy(stored)).numpy()))
    if USUAL_STD[0] <= std <= USUAL_STD[1] or (features.is_pixels and std > 0):
        return
    where = f"--feature_path {path}: the {'images' if features.is_pixels else 'latents'} of {len(rows)} samples"
    if not std > 0:
        print(f"warning: {where} are all equal or not finite; check the features before training on them")
        return
    print(
        f"warning: {where} times the latent scale {space.latent_scale:.4g} have a standard deviation of "
        f"{std:.3g}, but should have about 1; --latent_scale {space.latent_scale / std:.4g} would give 1"
    )
