"""Reads colour, shape, size, position and background from the pixels of an image of one shape.

It uses no model. It compares colours with the palette, and the outline of the object with the rendered outlines of all
40 combinations of shape, size and position.
"""

import functools
import itertools

import numpy as np
from PIL import Image

from uvit.sources.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, render

CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "size": 1 / len(SIZES),
    "position": 1 / len(POSITIONS),
    "background": 1 / len(BACKGROUNDS),
}
ATTRIBUTES = tuple(CHANCE)
MAX_COLOUR_DISTANCE = 75.0  # in RGB, 0..255 a channel; the palette's colours are at least 95 apart
MIN_OVERLAP = 0.6  # intersection over union of the object and the closest outline


def read_scene(image: Image.Image) -> dict[str, str | None]:
    """Attribute -> its value in the image, or None if the image shows no such thing."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)  # (R, R, 3)
    read: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)

    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    read["background"] = _closest(background, BACKGROUNDS)
    if read["background"] is None:
        return read

    distance = np.linalg.norm(pixels - background, axis=-1)  # (R, R)
    inside = distance > 0.7 * np.quantile(distance, 0.98)
    if distance.max() < MAX_COLOUR_DISTANCE:
        return read
    colour = np.median(pixels[inside], axis=0)
    read["colour"] = _closest(colour, COLOURS)

    direction = (colour - background) / np.sum((colour - background) ** 2)
    coverage = np.clip((pixels - background) @ direction, 0, 1)  # (R, R), the covered fraction of each pixel
    keys, outlines = _outlines(image.width)
    closest = int(np.square(coverage - outlines).sum((1, 2)).argmin())
    generated, rendered = coverage > 0.5, outlines[closest] > 0.5
    if (generated & rendered).sum() >= MIN_OVERLAP * (generated | rendered).sum():
        read["shape"], read["size"], read["position"] = keys[closest]
    return read


def _closest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    name = min(palette, key=lambda key: float(np.linalg.norm(colour - palette[key])))
    return name if np.linalg.norm(colour - palette[name]) <= MAX_COLOUR_DISTANCE else None


@functools.cache
def _outlines(resolution: int) -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """All (shape, size, position), and the fraction of each pixel that they cover, (40, R, R)."""
    keys = list(itertools.product(SHAPES, SIZES, POSITIONS))
    red = np.array(COLOURS["red"], dtype=np.float64)
    renderings = np.stack([np.asarray(render(Scene("red", *key, "black"), resolution)) for key in keys])
    return keys, renderings @ red / (red @ red)
