"""Accuracy counts what the reader reads."""

from typing import Any

import numpy as np
import pytest

from uvit.evaluate.attributes import AttributeReader, accuracies, attribute_sheet, chance
from uvit.evaluate.prompts import Prompt, list_prompts
from uvit.sources.shapes import Scene, render, scenes

SCENES: list[Any] = scenes("heldout")


def accuracy(prompted: list[Scene], shown: list[Scene]) -> dict[str, float]:
    pixels = np.stack([np.asarray(render(scene, 32)) for scene in shown])
    prompts = [Prompt(scene.captions()[0], "", scene=scene) for scene in prompted]
    return accuracies(AttributeReader().extract(pixels, prompts)["correct"])


def test_perfect_images_are_all_right() -> None:
    assert set(accuracy(SCENES, SCENES).values()) == {1.0}


def test_images_of_other_prompts_are_right_by_chance() -> None:
    results = accuracy(SCENES, SCENES[1:] + SCENES[:1])
    assert results["prompts"] == 0
    assert results["attributes"] == pytest.approx(chance()["attributes"], abs=0.1)


def test_one_wrong_attribute_costs_one_fifth_of_a_prompts_attributes_and_the_whole_prompt() -> None:
    scene = SCENES[0]
    other = Scene(**{**vars(scene), "colour": "red" if scene.colour != "red" else "blue"})
    results = accuracy([scene, scene], [scene, other])
    assert results["attributes"] == pytest.approx(0.9) and results["prompts"] == 0.5 and results["colour"] == 0.5


def test_the_sheet_shows_the_rendered_scene_beside_the_image() -> None:
    prompts = list_prompts("shapes", None, 4)
    images = [render(prompt.scene, 32) for prompt in prompts if prompt.scene]
    sheet = attribute_sheet(prompts, images)
    assert sheet.width > sheet.height
