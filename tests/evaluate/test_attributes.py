"""Accuracy counts what the reader reads; the command asks a pipeline and writes what it found."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sample.parts import tiny_pipeline_folder
from uvit.config.sample import EvaluateConfig
from uvit.evaluate.prompts import accuracy, chance, evaluate, sheet
from uvit.sources.shapes import Scene, render, scenes

SCENES: list[Any] = scenes("heldout")


def test_perfect_pictures_are_all_right() -> None:
    assert set(accuracy(SCENES, [render(scene, 32) for scene in SCENES]).values()) == {1.0}


def test_pictures_of_other_prompts_are_right_by_chance() -> None:
    results = accuracy(SCENES, [render(scene, 32) for scene in SCENES[1:] + SCENES[:1]])
    assert results["prompts"] == 0
    assert results["attributes"] == pytest.approx(chance()["attributes"], abs=0.1)


def test_one_wrong_attribute_costs_one_fifth_of_a_prompts_attributes_and_the_whole_prompt() -> None:
    scene = SCENES[0]
    other = Scene(**{**vars(scene), "colour": "red" if scene.colour != "red" else "blue"})
    results = accuracy([scene, scene], [render(scene, 32), render(other, 32)])
    assert results["attributes"] == pytest.approx(0.9) and results["prompts"] == 0.5 and results["colour"] == 0.5


def test_the_sheet_shows_what_was_asked_beside_what_was_drawn() -> None:
    images = [render(scene, 32) for scene in SCENES[:4]]
    picture = sheet(SCENES[:4], [scene.captions()[0] for scene in SCENES[:4]], images)
    assert picture.width > picture.height


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_pipeline_folder(tmp_path / "pipeline", num_tokens=77)
    evaluate(
        EvaluateConfig(
            pipeline=str(folder),
            output_dir=str(tmp_path / "out"),
            max_prompts=3,
            num_inference_steps=2,
            device="cpu",
            disable_tqdm=True,
        )
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_prompts"] == 3 and 0 <= results["attributes"] <= 1
    assert (tmp_path / "out" / "contact_sheet.png").stat().st_size > 1000
    assert "chance" in capsys.readouterr().out
