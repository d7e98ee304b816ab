"""The VAE and the text encoder: load them, encode images and captions, decode latents.

Shapes: B batch, T text tokens, D width of the text encoder, C latent channels, (h, w) latent size.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel
from transformers import logging as transformers_logging

from uvit.conventions import LATENT_SCALE, LatentSpace
from uvit.errors import UserError
from uvit.weights.clip_text import read_clip_text

STABLE_DIFFUSION_SCALE = 0.18215
WEIGHT_SUFFIXES = (".safetensors", ".pdparams", ".pth", ".pt", ".ckpt", ".bin")
VAE_PRESETS = (
    Path(__file__).parent.parent / "presets" / "vae"
)  # those that ship with the package; their names are accepted as paths


# Loading


def load_diffusers_vae(name_or_path: str) -> Any:
    """An AutoencoderKL from its folder, a pipeline folder or a Hub id: float32, eval mode, frozen.

    `shapes` names the VAE that ships for the built-in images. Only safetensors are read. Raises UserError where it
    cannot be loaded.
    """
    if (VAE_PRESETS / name_or_path).is_dir() and not Path(name_or_path).exists():
        name_or_path = str(VAE_PRESETS / name_or_path)

    def load(place: str, **options: Any) -> Any:
        _check_class(place, options, "AutoencoderKL")
        model, info = AutoencoderKL.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
        return _complete(model, info["missing_keys"])

    return _load(load, name_or_path, ("vqvae", "vae"), "vae_name_or_path", "an AutoencoderKL with safetensors weights")


def load_transformers_encoder(name_or_path: str) -> Any:
    """A text encoder of CLIP's, T5's or BERT's kind, found and prepared like the VAE."""

    def load(place: str, **options: Any) -> Any:
        if (encoder := read_clip_text(Path(place, options.get("subfolder", "")), torch.float32)) is not None:
            return _complete(encoder, [])
        model, info = text_encoder_class(place, **options).from_pretrained(
            place, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
        return _complete(model, [key for key in info["missing_keys"] if "pooler" not in key])  # the pooler is not used

    return _load(
        load,
        name_or_path,
        ("text_encoder",),
        "text_encoder_name_or_path",
        "a text encoder with safetensors weights",
    )


def text_encoder_class(place: str | Path, **options: Any) -> Any:
    """Of the model in a folder or on the Hub. From a CLIP with both towers, only the text tower is loaded."""
    kind = AutoConfig.from_pretrained(place, **options).model_type
    return CLIPTextModel if kind in ("clip", "clip_text_model") else AutoModelForTextEncoding


def load_tokenizer(name_or_path: str) -> Any:
    """A transformers tokenizer, found like the VAE."""

    def load(place: str, **options: Any) -> Any:
        folder = Path(place, options.get("subfolder", ""))
        if folder.is_dir() and not any(folder.glob("*token*")) and not (folder / "vocab.json").is_file():
            raise OSError("has no tokenizer files")
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token")
        return tokenizer

    return _load(load, name_or_path, ("tokenizer",), "tokenizer_name", "a tokenizer with a padding token")


def _load(load: Callable[..., Any], name_or_path: str, subfolders: tuple[str, ...], flag: str, what: str) -> Any:
    """Try the subfolders of a folder, then the folder; on the Hub, the repository first. Report the first error."""
    folder = Path(name_or_path)
    if folder.is_dir():
        name_or_path = str(folder)
        places = [{"subfolder": name} for name in subfolders if (folder / name).is_dir()]
        if not (folder / "model_index.json").is_file():
            places.append({})
        if not places:
            raise UserError(f"--{flag} {name_or_path}: is a pipeline folder without {what}")
    elif folder.exists() or is_local_path(name_or_path):
        problem = "is a file" if folder.exists() else "no such file or folder"
        raise UserError(f"--{flag} {name_or_path}: {problem}; give {what}, by folder or Hub id")
    else:
        places = [{}, *({"subfolder": name} for name in subfolders)]
    errors = []
    for place in places:
        try:
            with quiet():
                return load(name_or_path, **place)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            errors.append(" ".join(str(error).split())[:300])
    raise UserError(f"--{flag} {name_or_path}: {what} cannot be loaded from there ({errors[0]})")


def is_local_path(name: str) -> bool:
    """Whether this can only be a path on this machine, not a Hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(WEIGHT_SUFFIXES)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages and progress bars of diffusers and transformers; the callers check what they warn of."""
    loggers = (transformers_logging, diffusers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = [logger for logger in loggers if logger.is_progress_bar_enabled()]
    for logger in loggers:
        logger.disable_progress_bar()
        logger.set_verbosity(logger.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        for logger in bars:
            logger.enable_progress_bar()


def _check_class(place: str, options: dict[str, Any], expected: str) -> None:
    """diffusers would load the weights of another class as far as they fit."""
    config = Path(place, options.get("subfolder", ""), "config.json")
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
        if found != expected:
            raise ValueError(f"its config.json has _class_name {found!r}, not {expected!r}")


def _complete(model: Any, missing: Sequence[str]) -> Any:
    if missing:
        raise ValueError(f"its weights lack {len(missing)} parameters, the first being {sorted(missing)[0]}")
    if bad := not_finite(model.state_dict()):
        raise ValueError(f"its array {bad} holds NaN or infinity")
    return model.eval().requires_grad_(False)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first array with NaN or infinity in it."""
    return next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raises UserError, naming the array, where there is NaN or infinity in one."""
    if bad := not_finite(tensors):
        raise UserError(
            f"{where}: {bad} holds NaN or infinity; use other weights, such as those of an earlier checkpoint"
        )


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, types, shapes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_fingerprint(module: Any, expected: str | None, flag: str, name: str) -> str:
    """The fingerprint of an encoder or tokenizer. Raises UserError where it is not the expected one (None: not
    recorded).
    """
    found = fingerprint(module) if isinstance(module, nn.Module) else tokenizer_fingerprint(module)
    if expected is not None and found != expected:
        raise UserError(
            f"--{flag} {name}: is not the one that made the features (its fingerprint is {found[:12]}, not "
            f"{expected[:12]}); pass that one, or extract the features again with this one"
        )
    return found


# Images


def latent_space_of(vae: Any) -> LatentSpace:
    """What a U-ViT is trained on, of this VAE's latents: what its config says, read as by the pipelines of diffusers.

    They use `latents_mean` and `latents_std` where there are both. Stable Diffusion's VAE is an exception: it stores
    the `scaling_factor` 0.18215, the default of AutoencoderKL, and U-ViTs use 0.23010 with it.
    Raises UserError where the config contradicts itself.
    """
    config = vae.config
    scale, shift, mean, std = (
        config.get(key) for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    )
    has_mean = mean is not None and std is not None
    if scale == STABLE_DIFFUSION_SCALE and not shift and not has_mean:
        scale = LATENT_SCALE
    try:
        if shift and has_mean:
            raise ValueError("it has both a shift_factor and latents_mean")
        space = LatentSpace(scale, mean, std) if has_mean else LatentSpace(scale, shift or 0.0)
        space.check_channels(config["latent_channels"])
    except ValueError as error:
        raise UserError(f"the config.json of the VAE cannot be used: {error}; correct it") from None
    return space


def assume_latent_space(vae: Any | None, name: str | None, latent_scale: float | None) -> LatentSpace:
    """That of features which do not record it: of the VAE that `name` names, if one does. Prints what is assumed.

    latent_scale: of --latent_scale, in place of the VAE's own.
    """
    space = LatentSpace() if vae is None else latent_space_of(vae)
    sources = [] if vae is None else [f"the VAE {name}"]
    if latent_scale is not None:
        space = replace(space, latent_scale=latent_scale)
        sources.insert(0, "--latent_scale")
    source = " and ".join(sources) or "U-ViT's value for a Stable Diffusion VAE"
    described = space.describe_latents().capitalize() + ", no shift" * (space.latent_shift == 0)
    print(f"{described}: {source}. The features do not record it; --vae_name_or_path and --latent_scale change it.")
    return space


def downsampling_of(vae: Any | None) -> int:
    """Pixels per latent along a side: H / h. Without a VAE, for a model on pixels, 1."""
    return 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)


def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> moments (B, 2 C, h, w): mean and log-variance, the latter within -30..20.

    These bounds make it fit float16, and do not change what is sampled from the moments.
    """
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)  # logvar is clamped by diffusers


def decode_latents(vae: Any | None, latents: Tensor, space: LatentSpace) -> Tensor:
    """Latents x_0 (B, C, h, w), as in training -> images (B, 3, H, W) in [-1, 1]. `vae` is not used for pixels."""
    images = latents if space.is_pixels else vae.decode(space.denormalize(latents)).sample  # type: ignore[union-attr]
    return torch.where(images.isinf(), torch.nan, images.clamp(-1, 1))  # clamping must not hide an infinity


# Captions


def tokenize(tokenizer: Any, captions: Sequence[str], num_tokens: int) -> Tensor:
    """Token ids (B, T), int64, padded and cut to T = `num_tokens`."""
    encoded = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=num_tokens, return_tensors="pt"
    )
    return encoded["input_ids"]


def highest_token_id(tokenizer: Any) -> int:
    """Ids may have gaps, so this can be more than the number of tokens."""
    return max(tokenizer.get_vocab().values())


def num_positions(text_encoder: Any) -> int | None:
    """The number of tokens that a text encoder reads at most. None: any number."""
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    for name, module in text_encoder.named_modules():
        if positions and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1  # RoBERTa counts from after the padding token's id
    return positions


def are_truncated(tokenizer: Any, captions: Sequence[str], num_tokens: int) -> np.ndarray:
    """(B,) bool: whether a caption has more than `num_tokens` tokens, so that `tokenize` cuts it."""
    if not captions:
        return np.zeros(0, dtype=bool)
    whole = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
    return np.array([len(ids) > num_tokens for ids in whole])


def encode_tokens(text_encoder: Any, token_ids: Tensor, pad_token_id: int) -> Tensor:
    """(B, T) -> text embeddings (B, T, D), the last hidden state; differentiable.

    CLIP attends to the padding, as in Stable Diffusion and U-ViT; for other encoders it is masked.
    """
    if text_encoder.config.model_type.startswith("clip"):
        return text_encoder(input_ids=token_ids).last_hidden_state
    return text_encoder(input_ids=token_ids, attention_mask=(token_ids != pad_token_id).long()).last_hidden_state
