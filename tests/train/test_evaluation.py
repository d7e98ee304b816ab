"""Evaluation while training: the values of `uvit evaluate`, at no bit's cost to the training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.train.test_trainer import lines, same
from uvit.checkpoint.folder import checkpoint_folders
from uvit.config.evaluate import EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.evaluate import evaluate
from uvit.evaluate.reference import store_statistics
from uvit.sources.shapes import ShapesSource
from uvit.train.evaluation import Evaluation
from uvit.train.setup import build_run
from uvit.train.trainer import train


def scores(run: Path) -> list[dict[str, Any]]:
    """Of each evaluation, in order."""
    found = [{name: line[name] for name in line if name.startswith("eval_")} for line in lines(run)]
    return [each for each in found if each]


def test_it_makes_no_difference_to_training(
    evaluated_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ({}, {"train_text_encoder": True}):
        shutil.rmtree(tmp_path, ignore_errors=True)
        assert train(evaluated_config(output_dir=str(tmp_path / "with"), **flags)) == 0
        said = capsys.readouterr().out
        assert train(evaluated_config(output_dir=str(tmp_path / "without"), eval_metrics=(), **flags)) == 0
        assert same(tmp_path / "with" / "checkpoint-6", tmp_path / "without" / "checkpoint-6")
        found = lines(tmp_path / "with")
        assert [line["step"] for line in found if "eval_fd-tiny-vit" in line] == [2, 4, 6]
        assert len({each["eval_fd-tiny-vit"] for each in scores(tmp_path / "with")}) == 3
        kept = [{name: line[name] for name in line if not name.startswith("eval_")} for line in found]
        assert kept == lines(tmp_path / "without")
        assert said.count("10 images: a Frechet distance of so few is too large") == 1
        assert f", fd-tiny-vit {found[3]['eval_fd-tiny-vit']:.4g} at step 4" in said


def test_a_resumed_run_has_the_same_values(evaluated_config: Any, tmp_path: Path) -> None:
    assert train(evaluated_config(output_dir=str(tmp_path / "whole"))) == 0
    for max_steps in (3, 6):
        assert train(evaluated_config(output_dir=str(tmp_path / "parts"), max_steps=max_steps)) == 0
    assert scores(tmp_path / "parts")[0] == scores(tmp_path / "whole")[0]
    assert scores(tmp_path / "parts")[-2:] == scores(tmp_path / "whole")[-2:]


@pytest.mark.filterwarnings("ignore:the model reads 16 tokens")
@pytest.mark.parametrize("text", ["stored", "trained", "frozen"])
def test_the_values_are_those_of_evaluate(text: str, evaluated_config: Any, token_store: str, tmp_path: Path) -> None:
    """On the held-out shapes, whose captions the pipeline's own tokenizer and text encoder read."""
    flags = {"stored": {}, "trained": {"train_text_encoder": True}, "frozen": {"feature_path": token_store}}[text]
    assert train(evaluated_config(eval_metrics=("fd", "attributes"), max_steps=2, **flags)) == 0
    settings = EvaluateConfig(
        model=str(tmp_path / "run" / "checkpoint-2"), output_dir=str(tmp_path / "out"), prompts="shapes",
        max_prompts=10, metrics=("fd", "attributes"), num_inference_steps=(2,), batch_size=4, device="cpu",
        feature_extractor=evaluated_config().feature_extractor, reference=first_images(tmp_path), disable_tqdm=True,
    )  # fmt: skip
    evaluate(settings)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = {f"eval_{each['name']}": each["value"] for each in report["results"][0]["scores"]}
    [found] = scores(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name  # a pixel may round the other way


def first_images(folder: Path) -> str:
    """The first ten images that the validation features were made from."""
    source = ShapesSource("heldout", 16)
    (folder / "images").mkdir()
    for i in range(10):
        source[i].image.save(folder / "images" / f"{i}.png")
    return str(folder / "images")


# Bad input


def test_it_is_one_sentence_before_the_first_step(
    evaluated_config: Any, vit: str, edited_store: Callable[..., str], tmp_path: Path
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    (tmp_path / "other.npz").write_bytes(b"no statistics")
    for flags, message in (
        ({"feature_extractor": str(tmp_path / "nothing")}, "/nothing: no such folder"),
        ({"eval_metrics": ("fid",)}, "pt_inception-2015-12-05-6726825d.pth"),
        ({"eval_metrics": ("clip_score",), "clip_name_or_path": vit}, "a CLIP with its tokenizer cannot be loaded"),
        ({"eval_reference": str(tmp_path / "nothing")}, "^--eval_reference .*nothing"),
        ({"eval_reference": str(tmp_path / "other.npz")}, "other.npz: is damaged"),
        ({"eval_reference": str(tmp_path)}, "kid: needs at least 2 reference images|1 image has no covariance"),
        ({"eval_prompts": 1}, "^--eval_metrics fd, --eval_prompts 1: 1 image has no covariance"),
        ({"eval_metrics": ("prdc",), "eval_prompts": 4}, "needs at least"),
        ({"keep_best": "fd-other"}, "^--keep_best fd-other: .* one of val_loss, fd-tiny-vit, kid-tiny-vit"),
        ({"keep_best": "prdc", "eval_metrics": ("prdc",)}, "one of val_loss, precision-tiny-vit, recall-tiny-vit"),
        ({"keep_best": "val_loss", "validation_split": "val"}, "^--keep_best val_loss: .* nothing to validate on"),
    ):
        with pytest.raises(UserError, match=message):
            train(evaluated_config(**flags))
    assert not checkpoint_folders(tmp_path / "run")
    store = Path(edited_store())
    for path in store.glob("*/captions-*.jsonl"):
        text = path.read_text()
        for shape, other in (("circle", "bottle"), ("square", "bucket"), ("triangle", "elephant"), ("cross", "truck")):
            text = text.replace(shape, other)
        path.write_text(text)
    with pytest.raises(UserError, match=r"^--eval_metrics attributes: .* was not made from them"):
        train(evaluated_config(eval_metrics=("attributes",), feature_path=str(store)))


def test_images_that_are_not_finite_are_null(
    evaluated_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(evaluated_config(), tmp_path)
    evaluation = Evaluation(run, None)
    with torch.no_grad():
        run.ema_model["unet"].pos_embed.fill_(float("nan"))
    found = evaluation.measure()
    assert found["eval_fd-tiny-vit"] is None and found["eval_kid-tiny-vit"] is None
    assert "evaluation at step 0: the images have values that are NaN" in capsys.readouterr().out


def test_it_uses_no_random_numbers_and_no_gradients(evaluated_config: Any, tmp_path: Path) -> None:
    run = build_run(evaluated_config(use_ema=False, train_text_encoder=True), tmp_path)
    state, modes = torch.get_rng_state(), [module.training for module in run.master_model.modules()]
    evaluation = Evaluation(run, None)
    assert without_time(evaluation.measure()) == without_time(evaluation.measure())
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in run.master_model.modules()]
    assert all(parameter.grad is None for parameter in run.master_model.parameters())


def without_time(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith("eval_")}


def test_the_reference_is_images_statistics_or_those_of_the_features(
    evaluated_config: Any, vit: str, tmp_path: Path
) -> None:
    images = first_images(tmp_path)
    file = str(tmp_path / "images.npz")
    store_statistics(
        EvaluateStatisticsConfig(
            images, file, metric="fd", resolution=16, feature_extractor=vit, device="cpu", disable_tqdm=True
        )
    )
    run = build_run(evaluated_config(), tmp_path)
    found = [
        Evaluation(build_run(evaluated_config(eval_reference=given, eval_metrics=("fd",)), tmp_path), None).measure()
        for given in (None, images, file)
    ]
    values = [each["eval_fd-tiny-vit"] for each in found]
    assert run.validation is not None and values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
