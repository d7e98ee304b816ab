"""`uvit features sample`: decode a few pairs into one image, to check what a model is trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uvit.config.store import FeaturesSampleConfig
from uvit.conventions import LatentSpace
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil, to_unit
from uvit.store.reader import open_features
from uvit.store.types import Features
from uvit.weights.components import load_vae
from uvit.weights.encoders import decode_latents, fingerprint

BATCH_SIZE = 8
PLAIN, MIRRORED = 1.0, 0.0  # values of `flip_draws`


def show(config: FeaturesSampleConfig) -> None:
    """The command. Raises UserError if there are no features, no such rows or no VAE."""
    features = open_features(config.path, config.split, flag="path")
    rows = choose_rows(config, features.num_samples)
    vae = None if features.is_pixels else load_own_vae(config, features).to(pick_device(config.device))
    if features.is_pixels and config.vae_name_or_path:
        raise UserError(
            f"--vae_name_or_path {config.vae_name_or_path}: {config.path} holds images, which need no VAE; leave it out"
        )
    images: list[Image.Image] = []
    labels: list[str] = []
    sides = (PLAIN, MIRRORED) if features.flipped else (PLAIN,)
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            decoded = [decode_pairs(vae, features, batch, side) for side in sides]
            for row, versions in zip(batch, zip(*decoded, strict=True), strict=True):
                images += versions
                captions = features.captions(row)
                labels += [captions[0] if captions else f"row {row}", f"(mirrored) row {row}"][: len(versions)]
    columns = int(np.ceil(np.sqrt(len(rows)))) * len(sides)
    save_png(contact_sheet(images, labels, columns), Path(config.output), {"rows": str(rows)})
    print(f"{config.output}: {len(rows)} of {features.num_samples:,} pairs, rows {', '.join(map(str, rows))}")


def load_own_vae(config: FeaturesSampleConfig, features: Features) -> Any:
    """The VAE of --vae_name_or_path, or else that which the features name. Raises UserError if it does not fit them."""
    name = config.vae_name_or_path or features.vae_name
    if name is None:
        raise UserError(f"--path {config.path}: does not record its VAE; give --vae_name_or_path")
    vae = load_vae(name)
    if vae.config["latent_channels"] != features.latents_shape[0]:
        raise UserError(
            f"--vae_name_or_path {name}: has {vae.config['latent_channels']} latent channels, but the features are"
            f" moments of {features.latents_shape[0]}; give the VAE that made them"
        )
    if features.vae_sha256 not in (None, fingerprint(vae)):
        print(f"Warning: the VAE at {name} did not make these features: its weights differ.")
    return vae


def choose_rows(config: FeaturesSampleConfig, num_samples: int) -> list[int]:
    """--rows, or --num_images random rows in ascending order. Raises UserError for rows that do not exist."""
    rows = config.row_numbers()
    if rows is None:
        generator = np.random.default_rng(config.seed)
        return sorted(generator.choice(num_samples, min(config.num_images, num_samples), replace=False).tolist())
    if max(rows) >= num_samples:
        raise UserError(f"--rows {config.rows}: the rows are 0 to {num_samples - 1}; give some of these")
    return rows


def decode_pairs(vae: Any, features: Features, rows: list[int], side: float) -> list[Image.Image]:
    """Decode the mean of the rows' moments, or show their images (`vae` is None). `side`: PLAIN or MIRRORED."""
    flip_draws = np.full(len(rows), side) if features.flipped else None
    latents = features.read(np.array(rows), np.zeros(len(rows)), flip_draws).latents()
    if vae is None:
        return to_pil(to_unit(latents))
    means = torch.from_numpy(latents).float()
    return to_pil(decode_latents(vae, means.to(next(vae.parameters()).device), LatentSpace(1.0)))
