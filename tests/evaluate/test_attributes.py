"""Accuracy counts what the reader reads."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvit.errors import UserError
from uvit.evaluate.attributes import AttributeReader, SceneKind, accuracies, accuracy_table, attribute_sheet, chance
from uvit.evaluate.prompts import Prompt, list_prompts
from uvit.sources.shapes import PairScene, Scene, render, scenes

SCENES: list[Any] = scenes("heldout")
PAIRS: list[Any] = scenes("heldout", 2)
KINDS: list[Any] = [(Scene, SCENES), (PairScene, PAIRS)]


def accuracy(prompted: list[Any], shown: list[Any]) -> dict[str, float]:
    kind: SceneKind = type(prompted[0])
    pixels = np.stack([np.asarray(render(scene, 32)) for scene in shown])
    prompts = [Prompt(scene.captions()[0], "", scene=scene) for scene in prompted]
    return accuracies(AttributeReader(kind).extract(pixels, prompts)["correct"], kind)


@pytest.mark.parametrize(("kind", "known"), KINDS)
def test_perfect_images_are_all_right(kind: SceneKind, known: list[Any]) -> None:
    assert set(accuracy(known, known).values()) == {1.0}


@pytest.mark.parametrize(("kind", "known"), KINDS)
def test_images_of_other_prompts_are_right_by_chance(kind: SceneKind, known: list[Any]) -> None:
    results = accuracy(known, known[1:] + known[:1])
    assert list(results) == list(chance(kind))
    assert results == pytest.approx(chance(kind), abs=0.1)


def test_chance_of_one_object_is_one_in_the_number_of_choices() -> None:
    assert chance(Scene)["prompts"] == pytest.approx(1 / 720)


def test_chance_of_two_objects_is_that_of_all_images() -> None:
    """3,312 images, one of which is right; the figures are the means over random pairs of scenes."""
    assert chance(PairScene)["prompts"] == pytest.approx(1 / 3312)
    assert chance(PairScene)["related_objects"] == pytest.approx(1 / 1104)
    assert chance(PairScene)["objects"] == pytest.approx(1 / 276)
    assert chance(PairScene)["background"] == pytest.approx(1 / 3)
    assert accuracy_table(chance(PairScene), PairScene, 3, "heldout").count("\n") == 11


def test_one_wrong_attribute_costs_one_fifth_of_a_prompts_attributes_and_the_whole_prompt() -> None:
    scene = SCENES[0]
    other = Scene(**{**vars(scene), "colour": "red" if scene.colour != "red" else "blue"})
    results = accuracy([scene, scene], [scene, other])
    assert results["attributes"] == pytest.approx(0.9) and results["prompts"] == 0.5 and results["colour"] == 0.5


def failures(prompted: PairScene, shown: PairScene) -> set[str]:
    """The scores that are not 1."""
    found = {name for name, value in accuracy([prompted], [shown]).items() if value != 1}
    assert ("prompts" in found) == ("attributes" in found) == (prompted != shown)
    return found - {"prompts", "attributes"}


PROMPT = PairScene("red", "circle", "left of", "blue", "square", "white")


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (PROMPT, set()),
        # swapped colours, swapped shapes: neither object is there
        (PairScene("blue", "circle", "left of", "red", "square", "white"), {"colour", "other_colour", "objects"}),
        (PairScene("red", "square", "left of", "blue", "circle", "white"), {"shape", "other_shape", "objects"}),
        # both objects, in another relation
        (PairScene("red", "circle", "right of", "blue", "square", "white"), {"relation"}),
        (PairScene("blue", "square", "left of", "red", "circle", "white"), {"relation"}),
        (PairScene("red", "circle", "above", "blue", "square", "white"), {"relation"}),
        (PairScene("red", "circle", "below", "blue", "square", "white"), {"relation"}),
        # one attribute
        (PairScene("green", "circle", "left of", "blue", "square", "white"), {"colour", "objects"}),
        (PairScene("red", "circle", "left of", "blue", "cross", "white"), {"other_shape", "objects"}),
        (PairScene("red", "circle", "left of", "red", "circle", "white"), {"other_colour", "other_shape", "objects"}),
        (PairScene("red", "circle", "left of", "blue", "square", "grey"), {"background"}),
        # in the other relation, with another colour
        (PairScene("red", "circle", "right of", "green", "square", "white"), {"relation", "other_colour", "objects"}),
    ],
)  # fmt: skip
def test_errors_of_two_objects_are_counted_where_they_are(shown: PairScene, wrong: set[str]) -> None:
    related = {"related_objects"} if wrong - {"background"} else set()
    assert failures(PROMPT, shown) == wrong | related


def test_either_description_of_an_image_is_right() -> None:
    """The prompt and the image, each in both descriptions."""
    one = PairScene("red", "circle", "above", "red", "cross", "grey")
    other = PairScene("red", "cross", "below", "red", "circle", "grey")
    for prompted in (one, other):
        for shown in (one, other):
            assert accuracy([prompted], [shown])["prompts"] == 1


def test_objects_of_one_colour_in_the_other_relation_are_wrong_in_the_relation_alone() -> None:
    same_colour = PairScene("red", "circle", "left of", "red", "square", "white")
    same_shape = PairScene("red", "circle", "left of", "blue", "circle", "white")
    for scene in (same_colour, same_shape):
        shown = PairScene(**{**vars(scene), "relation": "right of"})
        assert failures(scene, shown) == {"relation", "related_objects"}


def test_a_missing_object_costs_its_attributes_and_the_relation() -> None:
    image = render(PROMPT, 32).copy()
    image.paste((255, 255, 255), (16, 0, 32, 32))
    correct = AttributeReader(PairScene).extract(np.asarray(image)[None], [Prompt("", "", scene=PROMPT)])["correct"]
    assert correct.tolist() == [[1, 1, 0, 0, 0, 1]]


def test_images_that_are_not_square_are_refused() -> None:
    for kind, known in KINDS:
        with pytest.raises(UserError, match=r"have 40 x 32 pixels.*give --resolution"):
            AttributeReader(kind).extract(np.zeros((1, 32, 40, 3), np.uint8), [Prompt("", "", scene=known[0])])


@pytest.mark.parametrize("name", ["shapes", "shapes:two"])
def test_the_sheet_shows_the_rendered_scene_beside_the_image(name: str) -> None:
    prompts = list_prompts(name, None, 4)
    images = [render(prompt.scene, 32) for prompt in prompts if prompt.scene]
    sheet = attribute_sheet(prompts, images)
    assert isinstance(sheet, Image.Image) and sheet.width > sheet.height
