"""Evaluation while training: the values of `uvit evaluate`, at no bit's cost to the training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from tests.train.test_trainer import lines, same
from uvit.checkpoint.folder import checkpoint_folders
from uvit.config.evaluate import EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.evaluate import evaluate
from uvit.evaluate.reference import store_statistics
from uvit.train.evaluation import Evaluation
from uvit.train.setup import build_run
from uvit.train.trainer import train


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vision model of random weights, 32 features."""
    folder = tmp_path_factory.mktemp("networks") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tiny_config: Any, vit: str) -> Any:
    """Evaluated after steps 2, 4 and 6."""
    flags = {
        "eval_metrics": ("fd", "kid"), "feature_extractor": vit, "eval_prompts": 10, "eval_steps": 2,
        "num_inference_steps": 2, "validation_split": "heldout", "num_validation_samples": 8,
    }  # fmt: skip
    return lambda **more: tiny_config(**(flags | more))


def scores(run: Path) -> list[dict[str, Any]]:
    """Of each evaluation, in order."""
    found = [{name: line[name] for name in line if name.startswith("eval_")} for line in lines(run)]
    return [each for each in found if each]


def test_it_makes_no_difference_to_training(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ({}, {"train_text_encoder": True}):
        shutil.rmtree(tmp_path, ignore_errors=True)
        assert train(config(output_dir=str(tmp_path / "with"), **flags)) == 0
        said = capsys.readouterr().out
        assert train(config(output_dir=str(tmp_path / "without"), eval_metrics=(), **flags)) == 0
        assert same(tmp_path / "with" / "checkpoint-6", tmp_path / "without" / "checkpoint-6")
        found = lines(tmp_path / "with")
        assert [line["step"] for line in found if "eval_fd-tiny-vit" in line] == [2, 4, 6]
        assert len({each["eval_fd-tiny-vit"] for each in scores(tmp_path / "with")}) == 3
        kept = [{name: line[name] for name in line if not name.startswith("eval_")} for line in found]
        assert kept == lines(tmp_path / "without")
        assert said.count("--eval_prompts 10: a Frechet distance of so few images is too large") == 1
        assert f", fd-tiny-vit {found[3]['eval_fd-tiny-vit']:.4g} at step 4" in said


def test_a_resumed_run_has_the_same_values(config: Any, tmp_path: Path) -> None:
    assert train(config(output_dir=str(tmp_path / "whole"))) == 0
    for max_steps in (3, 6):
        assert train(config(output_dir=str(tmp_path / "parts"), max_steps=max_steps)) == 0
    assert scores(tmp_path / "parts")[0] == scores(tmp_path / "whole")[0]
    assert scores(tmp_path / "parts")[-2:] == scores(tmp_path / "whole")[-2:]


@pytest.mark.filterwarnings("ignore:the model reads 16 tokens")
@pytest.mark.parametrize("text", ["stored", "trained", "frozen"])
def test_the_values_are_those_of_evaluate(text: str, config: Any, token_store: str, tmp_path: Path) -> None:
    """On the held-out shapes, whose captions the pipeline's own tokenizer and text encoder read."""
    flags = {"stored": {}, "trained": {"train_text_encoder": True}, "frozen": {"feature_path": token_store}}[text]
    assert train(config(eval_metrics=("fd", "attributes"), max_steps=2, **flags)) == 0
    evaluate(
        EvaluateConfig(
            model=str(tmp_path / "run" / "checkpoint-2"), output_dir=str(tmp_path / "out"), prompts="shapes",
            max_prompts=10, metrics=("fd", "attributes"), num_inference_steps=(2,), batch_size=4, device="cpu",
            feature_extractor=config().feature_extractor, reference=first_images(tmp_path), disable_tqdm=True,
        )  # fmt: skip
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = {f"eval_{each['name']}": each["value"] for each in report["results"][0]["scores"]}
    [found] = scores(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name  # a pixel may round the other way


def first_images(folder: Path) -> str:
    """The first ten images that the validation features were made from."""
    from uvit.sources.shapes import ShapesSource

    source = ShapesSource("heldout", 16)
    (folder / "images").mkdir()
    for i in range(10):
        source[i].image.save(folder / "images" / f"{i}.png")
    return str(folder / "images")


# The best checkpoint


def best(run: Path) -> dict[str, Any]:
    return json.loads((run / "best.json").read_text())


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(run)]


@pytest.fixture
def worsening(config: Any) -> Any:
    """Its validation loss is best after step 2, of 2, 4 and 6, where no checkpoint is due; then it learns nonsense."""
    flags = {"keep_best": "val_loss", "eval_metrics": (), "save_steps": 3, "save_total_limit": 1, "use_ema": False}
    return lambda **more: config(**(flags | {"learning_rate": 0.5, "warmup_steps": 100, "noise_offset": 0.0} | more))
