"""Evaluation while training: the values of `uvit evaluate`, at no bit's cost to the training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_vit_folder
from tests.train.test_trainer import lines, same
from uvit.checkpoint.folder import checkpoint_folders
from uvit.cli.main import main
from uvit.config.evaluate import EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.evaluate import evaluate
from uvit.evaluate.reference import store_statistics
from uvit.sources.shapes import ShapesSource
from uvit.train.evaluation import Evaluation
from uvit.train.setup import build_run
from uvit.train.trainer import train


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_vit_folder(tmp_path_factory.mktemp("networks") / "tiny-vit"))


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
    settings = EvaluateConfig(
        model=str(tmp_path / "run" / "checkpoint-2"), output_dir=str(tmp_path / "out"), prompts="shapes",
        max_prompts=10, metrics=("fd", "attributes"), num_inference_steps=(2,), batch_size=4, device="cpu",
        feature_extractor=config().feature_extractor, reference=first_images(tmp_path), disable_tqdm=True,
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


# The best checkpoint


def best(run: Path) -> dict[str, Any]:
    return json.loads((run / "best.json").read_text())


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(run)]


@pytest.fixture
def worsening(config: Any) -> Any:
    """Its validation loss is the best after step 2, where no checkpoint is due; then it learns too fast."""
    flags = {
        "keep_best": "val_loss", "eval_metrics": (), "save_steps": 3, "save_total_limit": 1, "max_steps": 8,
        "learning_rate": 1.0, "warmup_steps": 20, "use_ema": False,
    }  # fmt: skip
    return lambda **more: config(**(flags | more))


def test_the_best_checkpoint_survives_pruning(
    worsening: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(worsening()) == 0
    losses = {line["step"]: line["val_loss"] for line in lines(run) if "val_loss" in line}
    assert min(losses, key=lambda step: losses[step]) == 2
    assert best(run) == {"metric": "val_loss", "value": losses[2], "step": 2, "checkpoint": "checkpoint-2"}
    assert names(run) == ["checkpoint-2", "checkpoint-8"]
    capsys.readouterr()
    assert main(["checkpoints", "list", str(run)]) == 0
    _, first, last = capsys.readouterr().out.splitlines()
    assert first.endswith(f"best val_loss: {losses[2]:.4g}") and "best" not in last
    assert train(worsening(output_dir=str(tmp_path / "other"), keep_best=None, save_total_limit=None)) == 0
    assert lines(run) == lines(tmp_path / "other")
    assert names(tmp_path / "other") == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


def test_a_best_one_that_is_surpassed_is_pruned(worsening: Any, tmp_path: Path) -> None:
    assert train(worsening(learning_rate=0.03)) == 0
    assert names(tmp_path / "run") == ["checkpoint-8"] and best(tmp_path / "run")["step"] == 8


def test_a_resumed_run_knows_the_best(worsening: Any, tmp_path: Path) -> None:
    """Even if it was killed before best.json was written; and a checkpoint that is gone is not the best one."""
    run = tmp_path / "run"
    assert train(worsening(max_steps=5)) == 0
    (run / "best.json").unlink()
    assert train(worsening()) == 0
    assert best(run)["step"] == 2 and names(run) == ["checkpoint-2", "checkpoint-8"]
    assert train(worsening(max_steps=9, keep_best=None)) == 0  # without the flag, nothing is forgotten
    assert best(run)["step"] == 2 and names(run) == ["checkpoint-2", "checkpoint-9"]
    shutil.rmtree(run / "checkpoint-2")
    assert train(worsening(max_steps=10)) == 0
    assert best(run)["step"] == 10 and names(run) == ["checkpoint-10"]


def test_another_metric_has_another_best(worsening: Any, tmp_path: Path) -> None:
    assert train(worsening(max_steps=4)) == 0
    assert train(worsening(max_steps=6, eval_metrics=("kid",), keep_best="kid")) == 0
    found = best(tmp_path / "run")
    assert found["metric"] == "eval_kid-tiny-vit" and found["step"] == 6
    assert found["value"] == lines(tmp_path / "run")[5]["eval_kid-tiny-vit"]


def test_going_back_sets_a_later_best_aside(worsening: Any, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", {"learning_rate": 0.03, "save_total_limit": None}
    assert train(worsening(**flags)) == 0
    assert names(run) == [f"checkpoint-{step}" for step in (2, 3, 4, 6, 8)]
    assert train(worsening(**flags, resume_from_checkpoint="checkpoint-3", keep_best=None, max_steps=5)) == 0
    assert best(run)["step"] == 2 and names(run) == [f"checkpoint-{step}" for step in (2, 3, 5)]
    assert best(run / "set-aside-1")["checkpoint"] == "checkpoint-8"
    assert (run / "set-aside-1" / "checkpoint-8").is_dir()


def test_a_rollback_keeps_the_best(worsening: Any, poisoned_store: Callable[..., str], tmp_path: Path) -> None:
    """Samples 16 to 23, those of steps 5 and 6, give NaN."""
    flags = {"feature_path": poisoned_store(*range(16, 24)), "max_nonfinite_steps": 2}
    assert train(worsening(**flags)) == 0
    assert best(tmp_path / "run")["step"] == 2 and names(tmp_path / "run") == ["checkpoint-2", "checkpoint-8"]


# Bad input


def test_it_is_one_sentence_before_the_first_step(
    config: Any, vit: str, edited_store: Callable[..., str], tmp_path: Path
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
            train(config(**flags))
    assert not checkpoint_folders(tmp_path / "run")
    store = Path(edited_store())
    for path in store.glob("*/captions-*.jsonl"):
        text = path.read_text()
        for shape, other in (("circle", "bottle"), ("square", "bucket"), ("triangle", "elephant"), ("cross", "truck")):
            text = text.replace(shape, other)
        path.write_text(text)
    with pytest.raises(UserError, match=r"^--eval_metrics attributes: .* was not made from them"):
        train(config(eval_metrics=("attributes",), feature_path=str(store)))


def test_images_that_are_not_finite_are_null(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_run(config(), tmp_path)
    evaluation = Evaluation(run, None)
    with torch.no_grad():
        run.ema_model["unet"].pos_embed.fill_(float("nan"))
    found = evaluation.measure()
    assert found["eval_fd-tiny-vit"] is None and found["eval_kid-tiny-vit"] is None
    assert "evaluation at step 0: the images have values that are NaN" in capsys.readouterr().out


def test_it_uses_no_random_numbers_and_no_gradients(config: Any, tmp_path: Path) -> None:
    run = build_run(config(use_ema=False, train_text_encoder=True), tmp_path)
    state, modes = torch.get_rng_state(), [module.training for module in run.master_model.modules()]
    evaluation = Evaluation(run, None)
    assert without_time(evaluation.measure()) == without_time(evaluation.measure())
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in run.master_model.modules()]
    assert all(parameter.grad is None for parameter in run.master_model.parameters())


def without_time(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith("eval_")}


def test_the_reference_is_images_statistics_or_those_of_the_features(config: Any, vit: str, tmp_path: Path) -> None:
    images = first_images(tmp_path)
    file = str(tmp_path / "images.npz")
    store_statistics(
        EvaluateStatisticsConfig(
            images, file, metric="fd", resolution=16, feature_extractor=vit, device="cpu", disable_tqdm=True
        )
    )
    run = build_run(config(), tmp_path)
    found = [
        Evaluation(build_run(config(eval_reference=given, eval_metrics=("fd",)), tmp_path), None).measure()
        for given in (None, images, file)
    ]
    values = [each["eval_fd-tiny-vit"] for each in found]
    assert run.validation is not None and values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
