"""Prompt accuracy on the built-in shapes: the attributes of each prompt, read from the pixels of its image.

`shapes_reader` reads them. An attribute is correct if it is the one in the prompt. No other model is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from uvit.config.evaluate import EvaluateConfig
from uvit.errors import UserError
from uvit.evaluate.features import FeatureSet
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.shapes_reader import read_pair_scene, read_scene
from uvit.images import SHEET_COLOUR, contact_sheet
from uvit.sources.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, PairScene, Scene, render, scenes

MAX_SHEET_PROMPTS = 24
CHOICES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SceneKind = type[Scene] | type[PairScene]
LABELS = {
    "attributes": "all attributes",
    "objects": "both objects",
    "related_objects": "both, related",
    "prompts": "whole prompts",
}


@dataclass(frozen=True)
class AttributeReader:
    """Reads the attributes of images, and compares them with those of the prompts, which are of one kind of scene."""

    kind: SceneKind = Scene

    name = "attributes"
    uses_prompts = True

    @property
    def description(self) -> dict[str, Any]:
        return {"attributes": list(attributes_of(self.kind))}

    def extract(self, pixels: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        height, width = pixels.shape[1:3]
        if height != width:
            raise UserError(
                f"--metrics attributes: the images have {width} x {height} pixels, and shapes are read from squares; "
                "give --resolution"
            )
        correct = []
        for image, prompt in zip(map(Image.fromarray, pixels), prompts, strict=True):
            if isinstance(prompt.scene, PairScene):
                read = [str(value) for value in read_pair_scene(image).values()]
                correct.append(pairs_correct(np.array([read]), prompt.scene)[0])
            else:
                read_one = read_scene(image)
                correct.append([read_one[name] == getattr(prompt.scene, name) for name in attributes_of(Scene)])
        return {"correct": np.array(correct, dtype=np.uint8)}

    def accuracies(self, features: FeatureSet) -> dict[str, float]:
        return accuracies(features.arrays["correct"], self.kind)


def scene_kind(config: EvaluateConfig) -> SceneKind:
    return PairScene if config.prompts == "shapes:two" else Scene


def attributes_of(kind: SceneKind) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def pairs_correct(images: np.ndarray, scene: PairScene) -> np.ndarray:
    """What the images (N, 6) of two objects have in common with a scene -> (N, 6) of bool.

    An image has two descriptions, "A left of B" and "B right of A". The one that agrees in more attributes counts; of
    two that agree in as many, the one with the right relation, then the one with more right colours.
    """
    prompted = np.array(astuple(scene))
    colour, shape, relation, other_colour, other_shape, background = images.T
    turned = np.array([CONVERSE.get(each, each) for each in relation])
    converse = np.column_stack([other_colour, other_shape, turned, colour, shape, background])
    one, other = images == prompted, converse == prompted
    weights = np.array([11, 10, 15, 11, 10, 10])  # of the attributes; a tie is decided by the fives and ones
    return np.where((one @ weights >= other @ weights)[:, None], one, other)


def accuracies(correct: np.ndarray, kind: SceneKind) -> dict[str, float]:
    """(N, number of attributes) of 0 and 1 -> shares of correct images. The first one chooses the best of a sweep.

    `prompts` are right with all attributes; `attributes` is the mean of these. Of two objects, `objects` are both right
    with their own colours and shapes; `related_objects` stand to each other as prompted, as well.
    """
    results = {"prompts": float(correct.all(1).mean()), "attributes": float(correct.mean())}
    if kind is PairScene:
        results["related_objects"] = float(correct[:, :5].all(1).mean())
        results["objects"] = float(correct[:, [0, 1, 3, 4]].all(1).mean())
    return {**results, **dict(zip(attributes_of(kind), correct.mean(0).tolist(), strict=True))}


def chance(kind: SceneKind) -> dict[str, float]:
    """The accuracy of images that show any scene, by the same names.

    Of two objects, the better of two descriptions counts, so that an attribute is right more often than once in its
    choices. All colours and shapes are alike in this, so that prompts that begin with a red circle are enough.
    """
    if kind is Scene:
        shares = {name: 1 / len(choices) for name, choices in CHOICES.items()}
        return {"prompts": math.prod(shares.values()), "attributes": sum(shares.values()) / len(shares), **shares}
    every = [scene for split in ("train", "heldout") for scene in scenes(split, 2) if isinstance(scene, PairScene)]
    guesses = np.array([astuple(scene) for scene in every if scene.relation in ("left of", "above")])  # each image once
    prompted = [scene for scene in every if astuple(scene)[:3] == ("red", "circle", "left of")]
    return accuracies(np.concatenate([pairs_correct(guesses, scene) for scene in prompted]), PairScene)


def accuracy_table(results: dict[str, float], kind: SceneKind, num_prompts: int, split: str) -> str:
    guess = chance(kind)
    labels = {**{name: name.replace("_", " ") for name in attributes_of(kind)}, **LABELS}
    rows = [
        f"  {label:<15} {results[name]:>7.1%}   {guess[name]:>7.1%}" for name, label in labels.items() if name in guess
    ]
    return "\n".join([f"prompt accuracy on {num_prompts} {split} prompts", f"  {'':<15} correct    chance", *rows])


def attribute_sheet(prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> Image.Image:
    """The scene of each prompt, rendered, beside the generated image, with the prompt below."""
    cells = []
    for prompt, image in list(zip(prompts, images, strict=True))[:MAX_SHEET_PROMPTS]:
        assert prompt.scene is not None
        side = image.width
        cell = Image.new("RGB", (2 * side + 1, side), SHEET_COLOUR)
        cell.paste(render(prompt.scene, side), (0, 0))
        cell.paste(image, (side + 1, 0))
        cells.append(cell.resize((cell.width * 4, cell.height * 4), Image.Resampling.NEAREST))
    return contact_sheet(cells, [prompt.text for prompt in prompts[:MAX_SHEET_PROMPTS]], columns=6, cell=200)
