"""`uvit features sample`: a few pairs as a picture, so that one sees what a model will be shown."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from uvit.config.store import FeaturesSampleConfig
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil
from uvit.store.reader import open_features
from uvit.store.types import Features
from uvit.weights.components import load_vae
from uvit.weights.encoders import decode_latents, fingerprint

BATCH_SIZE = 8
PLAIN, MIRRORED = 1.0, 0.0  # as draws of what is read


def show(config: FeaturesSampleConfig) -> None:
    """The command. Raises UserError where there are no features, rows or VAE."""
    features = open_features(config.path, config.split, flag="path")
    rows = choose_rows(config, features.num_samples)
    name = config.vae_name_or_path or features.vae_name
    if name is None:
        raise UserError(f"--path {config.path}: names no VAE; give --vae_name_or_path")
    vae = load_vae(name)
    if 2 * vae.config["latent_channels"] != features.moments_shape[0]:
        raise UserError(
            f"--vae_name_or_path {name}: has {vae.config['latent_channels']} latent channels, and the moments' shape"
            f" {features.moments_shape} is for {features.moments_shape[0] // 2}; give the one they came from"
        )
    if features.vae_sha256 not in (None, fingerprint(vae)):
        print(f"The VAE at {name} is not the one that these features were made with: its weights differ.")
    vae = vae.to(pick_device(config.device))
    images: list[Image.Image] = []
    labels: list[str] = []
    sides = (PLAIN, MIRRORED) if features.flipped else (PLAIN,)
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            pictures = [decode_pairs(vae, features, batch, side) for side in sides]
            for row, versions in zip(batch, zip(*pictures, strict=True), strict=True):
                images += versions
                captions = features.captions(row)
                labels += [captions[0] if captions else f"row {row}", f"(mirrored) row {row}"][: len(versions)]
    columns = int(np.ceil(np.sqrt(len(rows)))) * len(sides)
    save_png(contact_sheet(images, labels, columns), Path(config.output).expanduser(), {"rows": str(rows)})
    print(f"{config.output}: {len(rows)} of {features.num_samples:,} pairs, rows {', '.join(map(str, rows))}")


def choose_rows(config: FeaturesSampleConfig, num_samples: int) -> list[int]:
    """--rows, or --num_images drawn by --seed, in order. Raises UserError for rows that are not there."""
    rows = config.row_numbers()
    if rows is None:
        generator = np.random.default_rng(config.seed)
        return sorted(generator.choice(num_samples, min(config.num_images, num_samples), replace=False).tolist())
    if max(rows) >= num_samples:
        raise UserError(f"--rows {config.rows}: there are rows 0 to {num_samples - 1}; name some of these")
    return rows


def decode_pairs(vae: torch.nn.Module, features: Features, rows: list[int], side: float) -> list[Image.Image]:
    """The pictures at the mean of the rows' moments, or of those of their mirrored images."""
    here = np.array(rows)
    draws = np.zeros(len(rows))
    flips = np.full(len(rows), side) if features.flipped else None
    mean, _ = torch.from_numpy(features.read(here, draws, flips).moments).float().chunk(2, dim=1)
    return to_pil(decode_latents(vae, mean.to(next(vae.parameters()).device), latent_scale=1.0))
