"""Validation, previews, and sampling from the EMA model.

The validation loss is taken on pairs that are not trained on. All runs use the same pairs, noise and timesteps, so that
their losses compare. Previews are images for the captions of the first training samples. Neither uses up any of a run's
own random numbers.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from uvit.conventions import LatentSpace
from uvit.diffusion import NUM_TIMESTEPS
from uvit.distributed.mesh import World
from uvit.distributed.ops import mean_over_data
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil, to_unit
from uvit.sample.denoise import denoise
from uvit.sample.schedulers import build_scheduler
from uvit.store.types import FeatureBatch, Features
from uvit.train.loader import Batch, permute, to_tensor
from uvit.train.setup import Run
from uvit.train.step import batch_context, compute_losses, encode_text
from uvit.weights.components import load_vae
from uvit.weights.detect import first_that_has
from uvit.weights.encoders import check_fingerprint, decode_latents

NUM_VALIDATION_TIMESTEPS = 8
SPACING = NUM_TIMESTEPS // NUM_VALIDATION_TIMESTEPS
TIMESTEPS = tuple(range(SPACING // 2 + 1, NUM_TIMESTEPS, SPACING))  # 63, 188, ..., 938: the middles of equal intervals
GUIDANCE_SCALES = (1.0, 7.5)  # of the previews
MAX_IMAGES = 8  # in a row of the previews
PREVIEW_STREAM, VALIDATION_STREAM = 4, 5  # streams of random numbers, beside those of the loader


# The validation loss


def is_due(run: Run) -> bool:
    """Whether to validate and evaluate after this step."""
    return run.config.eval_steps != -1 and (run.step % run.config.eval_steps == 0 or run.step == run.max_steps)


def validate(run: Run) -> dict[str, Any]:
    """The values for metrics.jsonl, None if not finite.

    `val_losses`, one for each timestep, and their mean `val_loss` are of the EMA model, if there is one. `val_loss_raw`
    is of the raw weights.
    """
    raw = losses(run, run.precision.compute_model)
    ema = losses(run, run.ema.model) if run.ema else raw
    return {
        "val_loss": _finite(float(np.mean(ema))),
        "val_loss_raw": _finite(float(np.mean(raw))),
        "val_losses": [_finite(value) for value in ema],
    }


@torch.no_grad()
def losses(run: Run, model: nn.Module) -> list[float]:
    """The unweighted mean squared error at each of TIMESTEPS."""
    features = run.validation
    assert features is not None
    rows = validation_rows(features.num_samples, run.config.num_validation_samples)
    totals = torch.zeros(NUM_VALIDATION_TIMESTEPS, dtype=torch.float64, device=run.device)
    training = model.training
    model.eval()
    size = equal_batch_size(len(rows), run.config.per_device_train_batch_size)
    with uncompiled(run):
        for counts, batch_rows in local_batches(rows, size, run.world):
            batch, noise = read_batch(features, np.resize(batch_rows, size), run.batches.use_tokens)  # rows again: full
            batch, noise = batch.to(run.device), noise.to(run.device)
            with run.precision.autocast():
                batch = replace(batch, context=batch_context(run, model, batch))  # once for all timesteps
            for i, timestep in enumerate(TIMESTEPS):
                noised = replace(batch, noise=noise[:, i], timesteps=torch.full_like(batch.timesteps, timestep))
                values = compute_losses(run, model, noised)
                if counts:
                    totals[i] += values[: len(batch_rows)].double().sum()
    model.train(training)
    totals = mean_over_data(totals, run.world) * run.world.num_data_ranks
    return (totals / len(rows)).tolist()


def equal_batch_size(num_rows: int, batch_size: int) -> int:
    """As many batches as `batch_size` makes, and as few rows in each as they need to be equally large."""
    return math.ceil(num_rows / math.ceil(num_rows / batch_size))


def uncompiled(run: Run) -> contextlib.AbstractContextManager[object]:
    """Run the network as it is, not as it is compiled: for batches of training alone, and with gradients."""
    return torch.compiler.set_stance("force_eager") if run.config.compile else contextlib.nullcontext()


def local_batches(rows: np.ndarray, batch_size: int, world: World) -> Iterator[tuple[bool, np.ndarray]]:
    """This process's batches: (whether it counts, its rows). All processes get equally many, as collectives demand."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for first in range(0, len(batches), world.num_data_ranks):
        index = first + world.data_rank
        yield index < len(batches), batches[min(index, len(batches) - 1)]


def validation_rows(num_samples: int, wanted: int) -> np.ndarray:
    """The first rows of a fixed permutation."""
    return permute(np.arange(min(num_samples, wanted)), num_samples, seed=0, epoch=0)


def read_batch(features: Features, rows: np.ndarray, use_tokens: bool) -> tuple[Batch, Tensor]:
    """(batch, noise for each timestep (B, 8, C, h, w)). First captions; none is dropped, no image is flipped."""
    num_posterior = 0 if features.is_pixels else 1
    shape = (num_posterior + NUM_VALIDATION_TIMESTEPS, *features.latents_shape)
    read = features.read(rows, np.zeros(len(rows)))
    # Each row has its own part of the stream, so its noise depends on neither the batch nor the run's seed.
    streams = [np.random.Philox(key=[0, VALIDATION_STREAM], counter=[0, 0, 0, row]) for row in rows.tolist()]
    normal = [np.random.Generator(stream).standard_normal(shape, dtype=np.float32) for stream in streams]
    noise = torch.from_numpy(np.stack(normal))
    batch = Batch(
        moments=to_tensor(read.moments),
        images=to_tensor(read.images),
        context=None if use_tokens else to_tensor(read.context),
        token_ids=torch.from_numpy(read.token_ids.astype(np.int64)) if use_tokens else None,  # type: ignore[union-attr]
        posterior_noise=noise[:, 0] if num_posterior else None,
        noise=noise[:, num_posterior],
        timesteps=torch.zeros(len(rows), dtype=torch.int64),
    )
    return batch, noise[:, num_posterior:]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Previews: images of the EMA model, for fixed captions and noise


@dataclass(frozen=True)
class Decoder:
    """Decodes x_0 to images: with the VAE of the features, on the run's device, or without one (`vae` is None)."""

    vae: AutoencoderKL | None
    space: LatentSpace

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1]."""
        return decode_latents(self.vae, latents, self.space)


def load_preview_decoder(run: Run) -> Decoder | None:
    """None: previews are turned off, or no flag names a VAE and that of the features cannot be loaded.

    Raises UserError if a flag names a VAE that cannot be loaded or did not make the features.
    """
    config = run.config
    if config.image_logging_steps <= 0:
        return None
    try:
        return load_decoder(run)
    except UserError as error:
        if first_that_has("vqvae", config.pretrained_model_name_or_path, config.vae_name_or_path):
            raise
        print(f"no previews: {error}")
        return None


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


@torch.no_grad()
def preview_sheet(run: Run, decode: Decoder) -> Image.Image:
    """Rows: training images as the VAE decodes them, samples with guidance 1.0 and with 7.5. Also saved in previews/.

    Without a VAE, the training images are those that are stored.
    """
    rows = np.arange(min(MAX_IMAGES, run.features.num_samples))
    read = run.features.read(rows, np.zeros(len(rows)))
    contexts = text_embeddings(run, with_empty_caption(run.features, read, run.batches.use_tokens))
    stored = torch.from_numpy(read.latents()).to(run.device)
    x_0 = to_unit(stored) if run.features.is_pixels else run.conventions.normalize(stored.float())
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, PREVIEW_STREAM]))
    noise = torch.from_numpy(generator.standard_normal(x_0.shape, dtype=np.float32)).to(run.device)

    images = to_pil(decode(x_0))
    for guidance_scale in GUIDANCE_SCALES:
        images += to_pil(sample_images(run, decode, noise, contexts, guidance_scale))
    captions = [run.features.captions(int(row)) for row in rows]
    labels = [texts[0] if texts else "" for texts in captions]
    labels += [f"guidance {scale}" for scale in GUIDANCE_SCALES for _ in rows]
    sheet = contact_sheet(images, labels, columns=len(rows), cell=max(64, images[0].width))
    if run.world.is_main:
        save_png(sheet, run.output_dir / "previews" / f"step-{run.step:08d}.png")
    return sheet


# Sampling from the EMA model, for previews and evaluations. The last of N + 1 texts is the empty caption.


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
