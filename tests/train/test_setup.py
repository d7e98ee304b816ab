"""A run is what its config says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.port import PORT_FOLDER
from uvit.config.extract import ExtractConfig
from uvit.errors import UserError
from uvit.extract.extract import extract
from uvit.train.setup import build_run
from uvit.train.trainer import train


def test_epochs_count_instead_of_steps(tiny_config: Any, tmp_path: Path) -> None:
    run = build_run(tiny_config(num_train_epochs=2.5), tmp_path)
    assert run.max_steps == 405 and run.samples_per_step == 4  # 648 pairs


def test_the_seed_makes_the_weights(tiny_config: Any, tmp_path: Path) -> None:
    one, same, other = (build_run(tiny_config(seed=seed), tmp_path).master_model.state_dict() for seed in (1, 1, 2))
    assert all((one[key] == same[key]).all() for key in one)
    assert any((one[key] != other[key]).any() for key in one)


def test_a_wider_initialisation(tiny_config: Any, tmp_path: Path) -> None:
    plain, wide = (
        build_run(tiny_config(**flags), tmp_path).master_model["unet"]
        for flags in ({}, {"weight_init_std": 0.06, "position_init_std": 0.5})
    )
    torch.testing.assert_close(wide.mid_block.mlp.fc1.weight, 3 * plain.mid_block.mlp.fc1.weight)
    torch.testing.assert_close(wide.pos_embed, 25 * plain.pos_embed)
    assert torch.equal(wide.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    with pytest.raises(UserError, match="--weight_init_std and --position_init_std are for initial weights"):
        tiny_config(weight_init_std=0.06, pretrained_model_name_or_path="x")


def test_training_goes_on_from_a_folder_of_the_port(tiny_config: Any, tmp_path: Path) -> None:
    """With its VAE and text encoder, for the features, for previews and in the pipeline at the end."""
    port = str(PORT_FOLDER)
    encoders = {"vae_name_or_path": port, "text_encoder_name_or_path": port}
    extract(
        ExtractConfig(source=("shapes",), output_dir=str(tmp_path / "store"), resolution=64, text="tokens", **encoders)
    )
    flags = {"feature_path": str(tmp_path / "store"), "pretrained_model_name_or_path": port, "latent_scale": 0.2301}
    assert train(tiny_config(**flags, max_steps=2, image_logging_steps=2, num_inference_steps=2)) == 0
    assert list((tmp_path / "run" / "previews").glob("*.png"))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_encoders_come_from_the_pretrained_folder_only_where_it_has_them(
    tiny_config: Any, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    model = build_run(tiny_config(), tmp_path).master_model["unet"]
    model.save_pretrained(tmp_path / "alone" / "unet")
    alone, vae = str(tmp_path / "alone"), str(encoders[0])
    run = build_run(tiny_config(pretrained_model_name_or_path=alone), tmp_path)
    assert torch.equal(run.master_model["unet"].pos_embed, model.pos_embed)
    known = [run.record()[name] for name in ("vae", "text_encoder", "tokenizer")]
    assert known == [run.features.vae_name, run.features.text_encoder_name, run.features.tokenizer_name]
    shutil.copytree(vae, tmp_path / "alone" / "vqvae")
    assert build_run(tiny_config(pretrained_model_name_or_path=alone), tmp_path).record()["vae"] == alone
    shutil.rmtree(tmp_path / "alone" / "vqvae")
    flags = {"pretrained_model_name_or_path": alone, "vae_name_or_path": vae, "max_steps": 1, "save_steps": 1}
    assert train(tiny_config(**flags)) == 0
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path nowhere\.pth: there is no such file"):
        build_run(tiny_config(pretrained_model_name_or_path="nowhere.pth"), tmp_path)
    weights = tmp_path / "alone" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path .*alone: has no U-ViT in unet/"):
        build_run(tiny_config(pretrained_model_name_or_path=alone), tmp_path)


def test_which_split_is_validated_on(tiny_config: Any, store: Path, tmp_path: Path) -> None:
    def num_samples(**flags: Any) -> int | None:
        validation = build_run(tiny_config(**flags), tmp_path).validation
        return validation and validation.num_samples

    assert num_samples() is None  # there is no split val, and nobody asked for it
    assert num_samples(validation_split="heldout") == 72
    assert num_samples(validation_split="heldout", eval_steps=-1) is None
    assert num_samples(validation_feature_path=str(store), validation_split="train") == 648
    shutil.copytree(store, tmp_path / "renamed")
    (tmp_path / "renamed" / "heldout").rename(tmp_path / "renamed" / "val")
    assert num_samples(feature_path=str(tmp_path / "renamed")) == 72
    assert num_samples(validation_feature_path=str(tmp_path / "renamed")) == 72


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation_split": "banana"}, r"--feature_path .*banana"),
        ({"validation_feature_path": "/nowhere"}, r"--validation_feature_path /nowhere"),
    ],
)
def test_a_validation_split_that_was_asked_for_must_be_there(
    flags: dict[str, Any], message: str, tiny_config: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_run(tiny_config(**flags), tmp_path)


def test_a_model_to_start_from_without_all_of_its_weights(tiny_config: Any, tmp_path: Path) -> None:
    unet = build_run(tiny_config(), tmp_path).ema_model["unet"]
    unet.save_pretrained(tmp_path / "model" / "unet")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    del weights["pos_embed"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"has no U-ViT in unet/ \(unet lacks: pos_embed\)"):
        build_run(tiny_config(pretrained_model_name_or_path=str(tmp_path / "model")), tmp_path)
