"""The VAE that `uvit autoencoder` trains: images, network, loss and PSNR."""

import functools
import math
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from uvit.config.extract import AutoencoderConfig
from uvit.diffusion import draw_latents
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil, to_pixels, to_unit
from uvit.sources.types import PairError, RandomAccessSource

INITIAL_LOG_VARIANCE = -6.0
HELD_OUT_SHARE, MAX_HELD_OUT = 20, 256  # one image in 20, for the PSNR
IMAGES, NOISE = 0, 1  # streams of random numbers


# Images


class VaeBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item s is what step s consumes: images (B, 3, R, R) uint8 and posterior noise (B, C, h, w), from (seed, s)."""

    def __init__(self, source: RandomAccessSource, rows: np.ndarray, config: AutoencoderConfig):
        self.source, self.rows, self.config = source, rows, config

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        config, side = self.config, self.config.resolution // self.config.factor
        chosen = self._generator(step, IMAGES).choice(self.rows, config.batch_size)
        images = load_images(self.source, chosen, config.resolution)
        shape = (len(images), config.latent_channels, side, side)
        return images, torch.from_numpy(self._generator(step, NOISE).standard_normal(shape, dtype=np.float32))

    def _generator(self, step: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.config.seed, step], counter=[0, 0, 0, stream]))


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and only the main one knows what to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load_images(source: RandomAccessSource, rows: np.ndarray, resolution: int) -> Tensor:
    """-> (B, 3, R, R) uint8, B at most the number of rows: unusable images are skipped, and named on stderr."""
    pixels = []
    for row in rows:
        try:
            pixels.append(to_pixels(source[int(row)].image, resolution))
        except PairError as error:
            _report(error.problem.message)
    return torch.from_numpy(np.array(pixels, np.uint8).reshape(-1, 3, resolution, resolution))


def load_some_images(source: RandomAccessSource, rows: np.ndarray, resolution: int) -> Tensor:
    """-> (B, 3, R, R) uint8, B at least 1"""
    images = load_images(source, rows, resolution)
    if not len(images):
        raise UserError(
            f"--source: no usable image among the {len(rows)} that were read; the reasons are printed above"
        )
    return images


@functools.cache
def _report(message: str) -> None:
    """Print each message once, however often its image is sampled."""
    print(f"skipped: {message}", file=sys.stderr)


def split_rows(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(held-out rows, training rows). A single image is used for both."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(num_images)
    num_held_out = min(MAX_HELD_OUT, max(1, num_images // HELD_OUT_SHARE))
    return order[:num_held_out], order[num_held_out:] if num_images > 1 else order


# Model and loss


def build_vae(config: AutoencoderConfig) -> AutoencoderKL:
    num_levels = int(math.log2(config.factor)) + 1
    vae = AutoencoderKL(
        sample_size=config.resolution,
        latent_channels=config.latent_channels,
        block_out_channels=[config.channels] + [2 * config.channels] * (num_levels - 1),
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=8,
    )
    # Begin almost without noise in the latents: with the standard deviation of 1 that fresh weights give, the first
    # thousands of steps learn little else than to get rid of it.
    torch.nn.init.constant_(vae.quant_conv.bias[config.latent_channels :], INITIAL_LOG_VARIANCE)
    return vae


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """(squared error + kl_weight KL, squared error); images (B, 3, R, R) in [-1, 1], noise like the latents."""
    moments = vae.quant_conv(vae.encoder(images))
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    error = (vae.decode(draw_latents(moments.float(), noise)).sample.float() - images).square().mean()
    return error + kl_weight * kl, error


def psnr_of(squared_error: float) -> float:
    """dB, of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


# Measuring


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, held_out: Tensor, others: Tensor, batch_size: int = 64) -> dict[str, float]:
    """PSNR of the mean's reconstruction over all held-out pixels, and 1 / std of the latents, from uint8 images."""
    error = latent_sum = latent_square = count = 0.0
    for pixels in held_out.split(batch_size):
        images = to_unit(pixels.to(vae.device))
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        error += float((decoded - images).square().mean()) * len(images) / len(held_out)
    for pixels in others.split(batch_size):
        posterior = vae.encode(to_unit(pixels.to(vae.device))).latent_dist
        latent_sum += float(posterior.mean.double().sum())
        latent_square += float((posterior.mean.double().square() + posterior.var.double()).sum())
        count += posterior.mean.numel()
    variance = latent_square / count - (latent_sum / count) ** 2
    return {"psnr": psnr_of(error), "latent_scale": 1 / math.sqrt(variance), "latent_mean": latent_sum / count}


@torch.no_grad()
def save_reconstructions(vae: AutoencoderKL, pixels: Tensor, path: Path, num_images: int = 16) -> None:
    """Held-out images in the upper half, their reconstructions in the lower."""
    images = to_unit(pixels[:num_images].to(vae.device))
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    half = len(images) // 2 or 1
    rows = [batch for part in zip(images.split(half), decoded.split(half), strict=True) for batch in part]
    save_png(contact_sheet([image for row in rows for image in to_pil(row)], columns=half), path)
