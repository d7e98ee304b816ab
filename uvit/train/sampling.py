"""Sample from a run's EMA model, for previews and evaluations. The last of N + 1 texts is the empty caption."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.sample.denoise import denoise
from uvit.sample.schedulers import build_scheduler
from uvit.store.types import FeatureBatch, Features
from uvit.train.setup import Run
from uvit.train.step import encode_text
from uvit.train.validate import uncompiled
from uvit.weights.components import load_vae
from uvit.weights.detect import first_that_has
from uvit.weights.encoders import check_fingerprint, decode_latents


@dataclass(frozen=True)
class Decoder:
    """Decodes x_0 to images: with the VAE of the features, on the run's device, or without one (`vae` is None)."""

    vae: AutoencoderKL | None
    space: LatentSpace

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1]."""
        return decode_latents(self.vae, latents, self.space)


def load_decoder(run: Run) -> Decoder:
    """Raises UserError if the VAE of the features cannot be loaded or is another one."""
    config = run.config
    if run.conventions.is_pixels:
        return Decoder(None, run.conventions)
    flags = (config.pretrained_model_name_or_path, config.vae_name_or_path)
    name = first_that_has("vqvae", *flags, run.features.vae_name)
    if name is None:
        raise UserError("the features do not name the VAE that made them; pass --vae_name_or_path")
    vae = load_vae(name)
    check_fingerprint(vae, run.features.vae_sha256, "vae_name_or_path", name)
    return Decoder(vae.to(run.device), run.conventions)


def with_empty_caption(features: Features, read: FeatureBatch, use_tokens: bool) -> Tensor:
    """Token ids (N + 1, T), int64, or stored text embeddings (N + 1, T, D)."""
    if use_tokens:
        ids = np.concatenate([read.token_ids, features.empty_token_ids[None]])  # type: ignore[index]
        return torch.from_numpy(ids.astype(np.int64))
    return torch.from_numpy(np.concatenate([read.context, features.empty_context[None]]))  # type: ignore[index]


def text_embeddings(run: Run, texts: Tensor) -> Tensor:
    """What `with_empty_caption` returns -> (N + 1, T, D) float, on the run's device."""
    texts = texts.to(run.device)
    return encode_text(run, run.ema_model, texts) if run.batches.use_tokens else texts.float()


def sample_images(run: Run, decode: Decoder, noise: Tensor, contexts: Tensor, guidance_scale: float) -> Tensor:
    """Noise (N, C, h, w) and text embeddings (N + 1, T, D) -> images (N, 3, H, W) in [-1, 1]."""
    with uncompiled(run):  # without EMA, the network that is trained
        latents = denoise(
            run.ema_model["unet"],
            build_scheduler(path=run.conventions.path, shift=run.config.timestep_shift),
            noise,
            contexts[:-1],
            contexts[-1:],
            guidance_scale=guidance_scale,
            num_inference_steps=run.config.num_inference_steps,
            prediction_type=run.conventions.prediction_type,
            path=run.conventions.path,
        )
    return decode(latents)
