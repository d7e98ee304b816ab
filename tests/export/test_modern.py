"""The modern U-ViT from training to samples: the same commands, files and errors as for the published one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import *  # noqa: F403 - the tiny store and runs
from tests.train.conftest import TINY_MODEL
from uvit import ModernUViTT2IModel, UViTPipeline, load_unet
from uvit.config.convert import ConvertConfig
from uvit.errors import UserError
from uvit.export.convert import convert
from uvit.train.trainer import train


@pytest.fixture
def modern_config(tiny_config: Any, tmp_path: Path) -> Any:
    path = tmp_path / "modern.json"
    path.write_text(json.dumps({"_class_name": "ModernUViTT2IModel", "skip": "add", **TINY_MODEL}))
    flags = {"uvit_config_file": str(path), "prediction_type": "sample", "weight_init_std": 0.06}
    return lambda **more: tiny_config(**(flags | more))


def test_trains_resumes_converts_and_samples(modern_config: Any, tmp_path: Path) -> None:
    train(modern_config(output_dir=str(tmp_path / "whole"), max_steps=4, bf16=True, recompute=True))
    train(modern_config(max_steps=2, save_steps=2, bf16=True, recompute=True, lr_scheduler_type="constant"))
    with pytest.raises(UserError, match=r"\n  unet_config\._class_name"):
        train(modern_config(uvit_config_file=str(published(tmp_path)), max_steps=4, bf16=True, recompute=True))
    run, goal = tmp_path / "run", tmp_path / "pipeline"
    ema = load_file(run / "checkpoint-2" / "ema.safetensors")
    convert(ConvertConfig(str(run / "checkpoint-2"), str(goal)))
    pipeline = UViTPipeline.from_pretrained(goal)
    assert type(pipeline.unet) is ModernUViTT2IModel and pipeline.unet.config["skip"] == "add"
    assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    for unet in (pipeline.unet, load_unet(goal / "unet"), ModernUViTT2IModel.from_pretrained(goal, subfolder="unet")):
        assert all(torch.equal(value, ema[f"unet.{name}"]) for name, value in unet.state_dict().items())
    train(
        modern_config(
            output_dir=str(tmp_path / "more"),
            pretrained_model_name_or_path=str(goal),
            max_steps=1,
            learning_rate=0.0,
            weight_init_std=0.02,
        )
    )
    again = load_file(tmp_path / "more" / "checkpoint-1" / "weights.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in again.items())


def published(folder: Path) -> Path:
    path = folder / "published.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path


def test_formats_of_other_systems_have_no_place_for_it(modern_config: Any, tmp_path: Path) -> None:
    train(modern_config(max_steps=1))
    source, goal = str(tmp_path / "run" / "checkpoint-1"), tmp_path / "goal"
    formats: list[Any] = ["official", "paddle", "port", "trainer"]
    for to in formats:
        with pytest.raises(
            UserError, match=f"^--to {to}: .* no place for the modern U-ViT .* --to pipeline, diffusers"
        ):
            convert(ConvertConfig(source, str(goal), to))
    assert not goal.exists()
