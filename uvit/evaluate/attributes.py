"""Prompt accuracy on the built-in shapes: the attributes of each prompt, read from the pixels of its image.

`shapes_reader` reads colour, shape, size, position and background. An attribute is correct if it is the one in the
prompt. No other model is needed.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from uvit.evaluate.features import FeatureSet
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.shapes_reader import ATTRIBUTES, CHANCE, read_scene
from uvit.images import SHEET_COLOUR, contact_sheet
from uvit.sources.shapes import render

MAX_SHEET_PROMPTS = 24


class AttributeReader:
    """Reads the attributes of images, and compares them with those of the prompts."""

    name = "attributes"
    description: ClassVar[dict[str, Any]] = {"attributes": list(ATTRIBUTES)}

    def extract(self, pixels: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        correct = []
        for image, prompt in zip(pixels, prompts, strict=True):
            read = read_scene(Image.fromarray(image))
            correct.append([read[name] == getattr(prompt.scene, name) for name in ATTRIBUTES])
        return {"correct": np.array(correct, dtype=np.uint8)}

    def accuracies(self, features: FeatureSet) -> dict[str, float]:
        return accuracies(features.arrays["correct"])


def accuracies(correct: np.ndarray) -> dict[str, float]:
    """(N, 5) of 0 and 1 -> the share of correct images for each attribute, their mean (`attributes`), and the share
    with all of them correct (`prompts`).
    """
    results = dict(zip(ATTRIBUTES, correct.mean(0).tolist(), strict=True))
    return {**results, "attributes": float(correct.mean()), "prompts": float(correct.all(1).mean())}


def chance() -> dict[str, float]:
    """The accuracy of guessing, by the same names."""
    whole = 1.0
    for value in CHANCE.values():
        whole *= value
    return {**CHANCE, "attributes": sum(CHANCE.values()) / len(CHANCE), "prompts": whole}


def accuracy_table(results: dict[str, float], num_prompts: int, split: str) -> str:
    guess = chance()
    names = {**{name: name for name in ATTRIBUTES}, "attributes": "all attributes", "prompts": "whole prompts"}
    rows = [f"  {label:<15} {results[name]:>7.1%}   {guess[name]:>7.1%}" for name, label in names.items()]
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
