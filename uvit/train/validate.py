"""Validation: the loss on pairs that are not trained on, with the same pairs, noise and timesteps in every run.

So runs and steps compare, and nothing of a run's own draws is used up.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from uvit.diffusion import NUM_TIMESTEPS
from uvit.distributed.mesh import World
from uvit.distributed.ops import mean_over_data
from uvit.errors import UserError
from uvit.export.convert import check_fingerprint
from uvit.images import contact_sheet, save_png, to_pil
from uvit.sample.denoise import denoise
from uvit.sample.schedulers import build_scheduler
from uvit.store.types import Features
from uvit.train.loader import Batch, permute
from uvit.train.setup import Run
from uvit.train.step import context_of, encode_text, loss_of
from uvit.weights.components import load_vae
from uvit.weights.detect import first_that_has
from uvit.weights.encoders import decode_latents

NUM_PARTS = 8
PART = NUM_TIMESTEPS // NUM_PARTS
TIMESTEPS = tuple(range(PART // 2 + 1, NUM_TIMESTEPS, PART))  # labels 63, 188, ..., 938: the middles of equal parts
VALIDATION_STREAM = 5  # a stream of random numbers of its own


def is_due(run: Run) -> bool:
    return run.validation is not None and (run.step % run.config.eval_steps == 0 or run.step == run.max_steps)


def validate(run: Run) -> dict[str, Any]:
    """For metrics.jsonl, None where not finite.

    `val_losses`, one a timestep, and their mean `val_loss` are the averaged weights', where there are any;
    `val_loss_raw` is of the weights that are trained.
    """
    raw = losses(run, run.precision.compute_model)
    averaged = losses(run, run.ema.model) if run.ema else raw
    return {
        "val_loss": _finite(float(np.mean(averaged))),
        "val_loss_raw": _finite(float(np.mean(raw))),
        "val_losses": [_finite(value) for value in averaged],
    }


@torch.no_grad()
def losses(run: Run, networks: nn.Module) -> list[float]:
    """Mean squared error at each of TIMESTEPS, in the run's prediction type and without weights."""
    features = run.validation
    assert features is not None
    rows = validation_rows(features.num_samples, run.config.num_validation_samples)
    totals = torch.zeros(NUM_PARTS, dtype=torch.float64, device=run.device)
    training = networks.training
    networks.eval()
    for mine, here in shares(rows, run.config.per_device_train_batch_size, run.world):
        batch, noise = read_batch(features, here, run.batches.use_tokens)
        batch, noise = batch.to(run.device), noise.to(run.device)
        with run.precision.autocast():
            batch = replace(batch, context=context_of(run, networks, batch))  # once for all timesteps
        for i, timestep in enumerate(TIMESTEPS):
            noised = replace(batch, noise=noise[:, i], timesteps=torch.full_like(batch.timesteps, timestep))
            value = loss_of(run, networks, noised)
            if mine:
                totals[i] += value * len(here)
    networks.train(training)
    totals = mean_over_data(totals, run.world) * run.world.num_data_ranks
    return (totals / len(rows)).tolist()


def shares(rows: np.ndarray, batch_size: int, world: World) -> Iterator[tuple[bool, np.ndarray]]:
    """This process's batches of rows, and whether they count: all must run the networks equally often."""
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for first in range(0, len(parts), world.num_data_ranks):
        index = first + world.data_rank
        yield index < len(parts), parts[min(index, len(parts) - 1)]


def validation_rows(num_samples: int, wanted: int) -> np.ndarray:
    """The first of a fixed permutation."""
    return permute(np.arange(min(num_samples, wanted)), num_samples, seed=0, epoch=0)


def read_batch(features: Features, rows: np.ndarray, use_tokens: bool) -> tuple[Batch, Tensor]:
    """(batch, noise for each timestep (B, 8, C, h, w)): first captions, none dropped, no image mirrored."""
    channels, height, width = features.moments_shape
    shape = (1 + NUM_PARTS, channels // 2, height, width)
    read = features.read(rows, np.zeros(len(rows)))
    # A stretch of the stream for each row: its noise depends on neither the batch nor the run's seed.
    streams = [np.random.Philox(key=[0, VALIDATION_STREAM], counter=[0, 0, 0, row]) for row in rows.tolist()]
    drawn = np.stack([np.random.Generator(bits).standard_normal(shape, dtype=np.float32) for bits in streams])
    noise = torch.from_numpy(drawn)
    batch = Batch(
        moments=torch.from_numpy(read.moments),
        context=None if use_tokens else torch.from_numpy(read.context),
        token_ids=torch.from_numpy(read.token_ids.astype(np.int64)) if use_tokens else None,  # type: ignore[union-attr]
        posterior_noise=noise[:, 0],
        noise=noise[:, 1],
        timesteps=torch.zeros(len(rows), dtype=torch.int64),
    )
    return batch, noise[:, 1:]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Pictures of a run while it trains: fixed captions and noise, drawn by the averaged weights


GUIDANCE_SCALES = (1.0, 7.5)
MAX_IMAGES = 8
PREVIEW_STREAM = 4  # a stream of random numbers of its own


def load_preview_vae(run: Run) -> AutoencoderKL | None:
    """The VAE for the previews, or None where none are asked for, or none can be had and none was named.

    Raises UserError where one was named and is not the one that made the features.
    """
    config = run.config
    if config.image_logging_steps <= 0:
        return None
    named = first_that_has("vqvae", config.pretrained_model_name_or_path, config.vae_name_or_path)
    try:
        if not (named or run.features.vae_name):
            raise UserError("the features do not say which VAE made them; pass --vae_name_or_path")
        name = named or run.features.vae_name or ""
        vae = load_vae(name)
        check_fingerprint(vae, run.features.vae_sha256, "vae_name_or_path", name)
        return vae.to(run.device)
    except UserError as error:
        if named:
            raise
        print(f"no previews: {error}")
        return None


@torch.no_grad()
def preview_sheet(run: Run, vae: AutoencoderKL) -> Image.Image:
    """Rows: the pictures themselves through the VAE, then guidance 1.0 and 7.5. Saved in previews/ too."""
    rows = np.arange(min(MAX_IMAGES, run.features.num_samples))
    read = run.features.read(rows, np.zeros(len(rows)))
    unet = run.ema_model["unet"]
    if run.batches.use_tokens:
        ids = np.concatenate([read.token_ids, run.features.empty_token_ids[None]]).astype(np.int64)  # type: ignore[index]
        contexts = encode_text(run, run.ema_model, torch.from_numpy(ids).to(run.device))
    else:
        stored = np.concatenate([read.context, run.features.empty_context[None]])  # type: ignore[index]
        contexts = torch.from_numpy(stored).to(run.device).float()
    context, empty_context = contexts[:-1], contexts[-1:]
    means = torch.from_numpy(read.moments).to(run.device).float().chunk(2, dim=1)[0]
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, PREVIEW_STREAM]))
    noise = torch.from_numpy(generator.standard_normal(means.shape, dtype=np.float32)).to(run.device)

    images = to_pil(decode_latents(vae, means * run.latent_scale, run.latent_scale))
    for guidance_scale in GUIDANCE_SCALES:
        latents = denoise(
            unet,
            build_scheduler("dpmsolver++"),
            noise,
            context,
            empty_context,
            guidance_scale=guidance_scale,
            num_inference_steps=run.config.num_inference_steps,
            prediction_type=run.config.prediction_type,
        )
        images += to_pil(decode_latents(vae, latents, run.latent_scale))
    captions = [run.features.captions(int(row)) for row in rows]
    labels = [texts[0] if texts else "" for texts in captions]
    labels += [f"guidance {scale}" for scale in GUIDANCE_SCALES for _ in rows]
    sheet = contact_sheet(images, labels, columns=len(rows), cell=max(64, images[0].width))
    if run.world.is_main:
        save_png(sheet, run.output_dir / "previews" / f"step-{run.step:08d}.png")
    return sheet
