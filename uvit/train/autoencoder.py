"""`uvit autoencoder`: a first stage of one's own, for those who have none and want no download."""

import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from uvit.config.extract import AutoencoderConfig
from uvit.device import pick_device
from uvit.diffusion import draw_latents
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil, to_pixels, to_unit
from uvit.sources.open import open_source, require_random_access
from uvit.sources.types import PairError, RandomAccessSource
from uvit.train.optimizer import EMA

NUM_WARMUP_STEPS = 100
INITIAL_LOG_VARIANCE = -6.0
REPORT_STEPS = 50
HELD_OUT_SHARE, MAX_HELD_OUT, MAX_MEASURED = 20, 256, 2048  # one image in 20, for the PSNR; images for the latent scale


class ImageBatches(Dataset[Tensor]):
    """Item s is the batch of step s: (B, 3, R, R) uint8, drawn from (seed, s)."""

    def __init__(self, source: RandomAccessSource, rows: np.ndarray, config: AutoencoderConfig):
        self.source, self.rows, self.config = source, rows, config

    def __len__(self) -> int:
        return self.config.max_steps

    def __getitem__(self, step: int) -> Tensor:
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, step]))
        return load_images(self.source, generator.choice(self.rows, self.config.batch_size), self.config.resolution)


def load_images(source: RandomAccessSource, rows: np.ndarray, resolution: int) -> Tensor:
    """-> (B, 3, R, R) uint8, B at most the number of rows: what cannot be used is left out, and named on stderr."""
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
        raise UserError(f"--source: none of its images can be used, of {len(rows)} looked at; why is said above")
    return images


@functools.cache
def _report(message: str) -> None:
    """Once for each message, however often its image is drawn."""
    print(f"left out: {message}", file=sys.stderr)


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
    error = (vae.decode(draw_latents(moments.float(), noise, 1.0)).sample.float() - images).square().mean()
    return error + kl_weight * kl, error


def train_autoencoder(config: AutoencoderConfig) -> None:
    """Train, measure, write: OUTPUT_DIR opens with `AutoencoderKL.from_pretrained`."""
    output_dir = Path(config.output_dir)
    if (output_dir / "config.json").exists() and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir}: holds an autoencoder already; choose another folder or pass "
            "--overwrite_output_dir"
        )
    device = pick_device(config.device)
    source = require_random_access(
        open_source(config.source, config.split, config.image_folder, config.resolution),
        f"--source {' '.join(config.source)}",
    )
    held_out, rows = split_rows(len(source), config.seed)
    while len(rows) > 1 and not len(load_images(source, held_out, config.resolution)):  # none of them can be used
        held_out, rows = rows[:1], rows[1:]
    torch.manual_seed(config.seed)
    vae = build_vae(config).to(device)
    ema = EMA(vae, config.ema_decay)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    size = config.resolution // config.factor
    held_out_images = load_some_images(source, held_out, config.resolution)
    num_parameters = sum(p.numel() for p in vae.parameters())
    latents = f"{config.latent_channels}x{size}x{size} latents"
    print(f"first stage: {num_parameters:,} parameters, {len(rows):,} images, {latents}")

    batches = DataLoader(ImageBatches(source, rows, config), batch_size=None, num_workers=config.num_workers)
    progress = tqdm(batches, disable=config.disable_tqdm, unit="step", desc="autoencoder")
    steps_done = 0
    try:
        for step, pixels in enumerate(progress):
            if not len(pixels):  # all of its images are broken
                continue
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * lr_factor(step, config.max_steps)
            images = to_unit(pixels.to(device))
            noise = torch.randn(len(images), config.latent_channels, size, size, device=device, generator=generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                total, error = vae_loss(vae, images, noise, config.kl_weight)
            if not torch.isfinite(total):
                raise UserError(
                    f"step {step}: the loss is {float(total)}; try a lower --learning_rate than {config.learning_rate}"
                )
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            ema.update(vae)
            steps_done = step + 1
            if steps_done % REPORT_STEPS == 0:
                report = f"PSNR {psnr_of(error.item()):.1f} dB"
                progress.set_postfix_str(report, refresh=False)
                if config.disable_tqdm:
                    print(f"step {steps_done}/{config.max_steps}: {report}", flush=True)
            if config.preview_steps > 0 and steps_done % config.preview_steps == 0:
                save_reconstructions(ema.model, held_out_images, output_dir / "previews" / f"step-{steps_done:06d}.png")
    except KeyboardInterrupt:
        print(f"\nstopped after {steps_done} of {config.max_steps} steps; writing what was learnt so far")

    averaged: Any = ema.model
    measured = measure_vae(averaged, held_out_images, load_some_images(source, rows[:MAX_MEASURED], config.resolution))
    save_reconstructions(averaged, held_out_images, output_dir / "previews" / "last.png")
    averaged.register_to_config(scaling_factor=measured["latent_scale"])
    facts = {
        **measured,
        "steps": steps_done,
        "parameters": num_parameters,
        "source": config.source,
        "seed": config.seed,
    }
    write_vae(averaged, facts, output_dir)
    print(
        f"PSNR {measured['psnr']:.2f} dB on {len(held_out_images)} images that it was not trained on, "
        f"latent scale {measured['latent_scale']:.4f}: {output_dir}"
    )


def split_rows(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(held-out rows, training rows); a source of one image is both."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(num_images)
    num_held_out = min(MAX_HELD_OUT, max(1, num_images // HELD_OUT_SHARE))
    return order[:num_held_out], order[num_held_out:] if num_images > 1 else order


def lr_factor(step: int, max_steps: int) -> float:
    return min((step + 1) / NUM_WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / max_steps)))


def psnr_of(squared_error: float) -> float:
    """dB, of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


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


def write_vae(vae: AutoencoderKL, facts: dict[str, object], output_dir: Path) -> None:
    """Weights, config and what was measured; whatever stood there before is set aside under another name."""
    aside = output_dir / f".writing-{os.getpid()}"
    vae.save_pretrained(aside)
    (aside / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for new in sorted(aside.iterdir()):
        old = output_dir / new.name
        if old.exists():
            kept = next(
                p for i in range(1, 10000) if not (p := old.with_name(f"{old.stem}.old{i}{old.suffix}")).exists()
            )
            old.replace(kept)
            print(f"{old} is now {kept.name}")
        new.replace(old)
    aside.rmdir()
