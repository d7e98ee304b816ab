"""From images to images with a VAE that has a shift: as with the same VAE whose convention is part of its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tests.tiny import tiny_vae_folder
from tests.train.conftest import TINY_MODEL
from uvit import UViTPipeline, UViTT2IModel
from uvit.cli.main import main
from uvit.conventions import Conventions, LatentSpace
from uvit.store.reader import open_features
from uvit.weights.encoders import latent_space_of

MEAN, STD = [0.3, -0.2, 0.1, 0.5], [0.5, 2.0, 1.5, 0.8]
VAES: dict[str, dict[str, Any]] = {
    "shift": {"scaling_factor": 1.5, "shift_factor": 0.06},
    "mean and std": {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
}


@torch.no_grad()
def fold(source: Path, target: Path) -> Path:
    """The same VAE, with latents that are x_0 already: its 1x1 convolutions scale and shift."""
    vae: Any = AutoencoderKL.from_pretrained(source)
    space = latent_space_of(vae)
    shift, std = (torch.zeros(4) + torch.tensor(value) for value in (space.latent_shift, space.latent_std))
    factor, quant, post = space.latent_scale / std, vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(dim=1)
    post.weight /= factor.view(1, 4, 1, 1)
    quant.weight[:4] *= factor.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - shift) * factor
    quant.bias[4:] += 2 * factor.log()
    vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    vae.save_pretrained(target)
    return target


def uvit(words: str) -> None:
    assert main(words.split()) == 0


def run(folder: Path, vae: Path) -> tuple[list[float], Tensor]:
    """Extract, train three steps, and sample: (losses, an image)."""
    (folder / "model.json").parent.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(TINY_MODEL))
    uvit(
        f"extract --source shapes --resolution 16 --vae_name_or_path {vae} --text tokens --vocab_size 300 "
        f"--model_max_length 16 --dtype float32 --num_workers 0 --disable_tqdm --output_dir {folder}/store"
    )
    uvit(
        f"train --feature_path {folder}/store --output_dir {folder}/run --uvit_config_file {folder}/model.json "
        "--train_text_encoder --text_encoder_layers 1 --per_device_train_batch_size 4 --max_steps 3 --device cpu "
        "--dataloader_num_workers 0 --logging_steps 1 --image_logging_steps 3 --eval_steps -1 --num_inference_steps 2 "
        "--disable_tqdm"
    )
    lines = [json.loads(line) for line in (folder / "run/logs/metrics.jsonl").read_text().splitlines()]
    pipeline = UViTPipeline.from_pretrained(folder / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a red circle", generator=generator, num_inference_steps=3, output_type="pt").images
    return [line["loss"] for line in lines if "loss" in line], images


@pytest.mark.parametrize("settings", VAES.values(), ids=VAES)
def test_a_convention_is_as_good_as_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    vae = tiny_vae_folder(tmp_path / "vae", **settings)
    losses, images = run(tmp_path / "one", vae)
    folded_losses, folded_images = run(tmp_path / "two", fold(vae, tmp_path / "folded"))
    assert losses == pytest.approx(folded_losses, rel=1e-4)  # sums of float32 in another order
    assert torch.allclose(images, folded_images, atol=1e-3)

    space = latent_space_of(AutoencoderKL.from_pretrained(vae))
    assert open_features(tmp_path / "one" / "store").latent_space == space
    for path in ("run/pipeline/unet/config.json", "run/checkpoint-3/uvit.json"):
        content = json.loads((tmp_path / "one" / path).read_text())
        assert LatentSpace.recorded(content) == space, path
    unet: Any = UViTT2IModel.from_pretrained(tmp_path / "one" / "run" / "pipeline" / "unet")
    assert Conventions.recorded(unet.config) == Conventions(*vars(space).values())


def test_npy_features_take_the_latent_space_of_the_vae_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = tiny_vae_folder(tmp_path / "vae", shift_factor=0.1)
    generator = np.random.default_rng(0)
    (tmp_path / "npy" / "train").mkdir(parents=True)
    for i in range(4):
        np.save(tmp_path / "npy" / "train" / f"{i}.npy", generator.standard_normal((8, 4, 4), dtype=np.float32))
        np.save(tmp_path / "npy" / "train" / f"{i}_0.npy", generator.standard_normal((16, 32), dtype=np.float32))
    np.save(tmp_path / "npy" / "empty_context.npy", np.zeros((16, 32), np.float32))
    (tmp_path / "model.json").write_text(json.dumps(TINY_MODEL))
    words = (
        f"train --feature_path {tmp_path}/npy --uvit_config_file {tmp_path}/model.json --per_device_train_batch_size "
    )
    words += "2 --max_steps 1 --device cpu --dataloader_num_workers 0 --image_logging_steps 0 --disable_tqdm"
    for name, flags, wanted, says in (
        ("a", f"--vae_name_or_path {vae}", LatentSpace(0.5, 0.1), f"Latent scale 0.5, shift 0.1: the VAE {vae}. The"),
        (
            "b",
            f"--vae_name_or_path {vae} --latent_scale 2",
            LatentSpace(2, 0.1),
            "shift 0.1: --latent_scale and the VAE",
        ),
        ("c", "", LatentSpace(), "Latent scale 0.2301, no shift: U-ViT's value for a Stable Diffusion VAE. The"),
    ):
        main([*words.split(), *flags.split(), "--output_dir", str(tmp_path / name)])
        assert says in capsys.readouterr().out
        record = json.loads((tmp_path / name / "checkpoint-1" / "uvit.json").read_text())
        assert LatentSpace.recorded(record) == wanted
    uvit(f"features import {tmp_path}/npy --vae_name_or_path {vae} --output_dir {tmp_path}/store --disable_tqdm")
    assert open_features(tmp_path / "store").latent_space == LatentSpace(0.5, 0.1)
    capsys.readouterr()
    uvit(f"features export {tmp_path}/store --output_dir {tmp_path}/back --disable_tqdm")
    assert "Not exported: latent scale 0.5, shift 0.1." in capsys.readouterr().out
