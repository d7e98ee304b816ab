"""A first stage trained for a moment: it learns, measures itself, and opens where first stages open."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tests.sources.pictures import png
from uvit.config.extract import AutoencoderConfig
from uvit.diffusion import draw_latents
from uvit.errors import UserError
from uvit.images import to_unit
from uvit.sources.open import open_source, require_random_access
from uvit.train.autoencoder import train_autoencoder
from uvit.train.vae_model import build_vae, load_images, measure_vae, split_rows
from uvit.weights.encoders import encode_images, latent_scale_of, load_diffusers_vae


def config(folder: Path, **flags: Any) -> AutoencoderConfig:
    values: dict[str, Any] = {
        "source": ("shapes",),
        "output_dir": str(folder),
        "resolution": 16,
        "factor": 4,
        "channels": 8,
        "max_steps": 150,
        "learning_rate": 3e-3,
        "batch_size": 4,
        "ema_decay": 0.9,
        "device": "cpu",
        "disable_tqdm": True,
    }
    return AutoencoderConfig(**(values | flags))


def test_train_measure_write_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "vae"
    train_autoencoder(config(folder, preview_steps=75))
    facts = json.loads((folder / "training.json").read_text())
    source = require_random_access(open_source("shapes", resolution=16), "--source shapes")
    held_out, rows = split_rows(len(source), 1234)
    images = load_images(source, rows, 16)
    untrained = measure_vae(build_vae(config(folder)), load_images(source, held_out, 16), images[:8])
    assert facts["psnr"] > untrained["psnr"] + 1 and facts["steps"] == 150
    assert (folder / "previews" / "step-000075.png").is_file() and (folder / "previews" / "last.png").is_file()
    assert "PSNR" in capsys.readouterr().out

    vae = load_diffusers_vae(str(folder))
    assert AutoencoderKL.from_pretrained(folder).config.scaling_factor == facts["latent_scale"]
    assert latent_scale_of(vae) == facts["latent_scale"]
    moments = encode_images(vae, to_unit(images))
    latents = draw_latents(moments, torch.randn(moments.shape[0], 4, 4, 4), facts["latent_scale"])
    assert latents.std().item() == pytest.approx(1, abs=0.02)  # what the scale is for

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert train_autoencoder(config(folder, preview_steps=75)) == 0
    said = capsys.readouterr().out
    assert f"{folder}: all 150 steps are done" in said and "the VAE is there already" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("factor", [4, 8])
def test_the_factor_is_the_factor(factor: Any, tmp_path: Path) -> None:
    vae = build_vae(config(tmp_path, factor=factor, latent_channels=6))
    moments = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.parameters
    assert moments.shape == (1, 12, 16 // factor, 16 // factor)


def test_held_out_images_are_not_trained_on() -> None:
    held_out, rows = split_rows(100, 0)
    assert len(held_out) == 5 and not set(held_out) & set(rows) and len(rows) == 95
    one, same = split_rows(1, 0)
    assert list(one) == list(same) == [0]


def test_measured_psnr_is_psnr(tmp_path: Path) -> None:
    vae = build_vae(config(tmp_path)).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_unit(images)).latent_dist.mean).sample.clamp(-1, 1)
    error = ((decoded - to_unit(images)) / 2).square().mean().item()
    assert measure_vae(vae, images, images, batch_size=4)["psnr"] == pytest.approx(-10 * np.log10(error), rel=1e-5)


def test_images_that_cannot_be_used_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("red")
        (tmp_path / f"{number}.png").write_bytes(png("red"))
    source = require_random_access(open_source(str(tmp_path)), "--source")
    (tmp_path / "3.png").write_bytes(png("red")[:-30])
    assert load_images(source, np.array([2, 3, 4, 3]), 16).shape == (2, 3, 16, 16)
    assert load_images(source, np.array([3]), 16).shape == (0, 3, 16, 16)
    assert capsys.readouterr().err.count("the image of 3.png cannot be decoded") == 1
    train_autoencoder(config(tmp_path / "vae", source=(str(tmp_path),), max_steps=8, batch_size=1))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of its images can be used"):
        train_autoencoder(config(tmp_path / "none", source=(str(tmp_path),)))
