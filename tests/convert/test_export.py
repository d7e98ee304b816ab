"""A checkpoint becomes a pipeline folder with the averaged or the raw weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from tests.train.conftest import *  # noqa: F403 - the tiny store and runs
from uvit import UViTPipeline
from uvit.config.convert import ConvertConfig
from uvit.convert.export import convert, exported_facts
from uvit.data.encoders import fingerprint, load_vae
from uvit.errors import UserError
from uvit.train.trainer import train


@pytest.mark.parametrize(("use_ema", "file"), [(True, "ema"), (False, "weights")])
def test_the_weights_asked_for(use_ema: bool, file: str, tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(prediction_type="v_prediction"))
    source, goal = tmp_path / "run" / "checkpoint-3", tmp_path / "pipeline"
    convert(ConvertConfig(str(source), str(goal), use_ema=use_ema))
    pipeline = UViTPipeline.from_pretrained(goal)
    weights = load_file(source / f"{file}.safetensors")
    assert all(torch.equal(value, weights[f"unet.{key}"]) for key, value in pipeline.unet.state_dict().items())
    assert pipeline.config.prediction_type == "v_prediction" and pipeline.config.latent_scale == 0.5
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_nothing_is_replaced_unasked(tiny_config: Any, tmp_path: Path, encoders: tuple[Path, Path]) -> None:
    train(tiny_config(max_steps=1))
    source, goal = str(tmp_path / "run" / "checkpoint-1"), tmp_path / "pipeline"
    convert(ConvertConfig(source, str(goal), vae_name_or_path=str(encoders[0])))
    with pytest.raises(UserError, match="--overwrite"):
        convert(ConvertConfig(source, str(goal)))
    convert(ConvertConfig(source, str(goal), overwrite=True))
    assert (tmp_path / "pipeline.old1" / "model_index.json").is_file()


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint"):
        convert(ConvertConfig(str(tmp_path), str(tmp_path / "pipeline")))


def test_encoders_must_be_those_of_the_features(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for a VAE that is named when converting: one with a better decoder may fit as well."""
    vae = tiny_vae_folder(tmp_path / "vae", seed=1)
    encoder = tiny_text_encoder_folder(tmp_path / "text", seed=1)
    assert train(tiny_config(max_steps=1, vae_name_or_path=str(vae))) == 0
    said = capsys.readouterr().out
    assert f"no pipeline was written: --vae_name_or_path {vae}: is not the one that made the features" in said
    source, goal = str(tmp_path / "run" / "checkpoint-1"), tmp_path / "pipeline"
    convert(ConvertConfig(source, str(goal), vae_name_or_path=str(vae)))
    assert exported_facts(goal)["vae_sha256"] == fingerprint(load_vae(str(vae)))
    with pytest.raises(UserError, match=f"--text_encoder_name_or_path {encoder}: is not the one"):
        convert(ConvertConfig(source, str(goal), overwrite=True, text_encoder_name_or_path=str(encoder)))


def test_what_a_folder_says_of_its_training(tmp_path: Path) -> None:
    assert exported_facts(tmp_path) == {}
    (tmp_path / "training.json").write_text("[1]")
    assert exported_facts(tmp_path) == {}
