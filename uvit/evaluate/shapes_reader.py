"""Reads the attributes of the built-in shapes from the pixels of an image, of one object or of two.

It uses no model. It compares colours with the palette, and the outline of an object with the rendered outlines of all
combinations of shape, size and position.
"""

import functools
import itertools
from dataclasses import fields

import numpy as np
from PIL import Image

from uvit.sources.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, PairScene, Scene, render

MAX_COLOUR_DISTANCE = 75.0  # in RGB, 0..255 a channel; the palette's colours are at least 95 apart
MIN_OVERLAP = 0.6  # intersection over union of the object and the closest outline
MAX_STRAY = 0.01  # the share of an image that may be coloured beside its two objects

Read = dict[str, str | None]  # attribute -> its value in the image, or None if the image shows no such thing


def read_scene(image: Image.Image) -> Read:
    """The attributes of a `Scene` in a square image."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)  # (R, R, 3)
    read: Read = dict.fromkeys(field.name for field in fields(Scene))
    background, read["background"] = _background(pixels)
    if read["background"] is None:
        return read
    keys, outlines = _outlines(image.width)
    read["colour"], closest, overlap = _read_object(pixels, background, outlines)
    if overlap >= MIN_OVERLAP:
        read["shape"], read["size"], read["position"] = keys[closest]
    return read


def read_pair_scene(image: Image.Image) -> Read:
    """The attributes of a `PairScene` in a square image, of which the first object is at the left or at the top.

    So the relation is "left of" or "above": "B right of A" is the same image as "A left of B". It is None unless there
    are two objects, and nothing else.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)  # (R, R, 3)
    read: Read = dict.fromkeys(field.name for field in fields(PairScene))
    background, read["background"] = _background(pixels)
    if read["background"] is None:
        return read
    best = -1.0
    for relation, halves in _pair_outlines(image.width).items():
        axis = 1 if relation == "left of" else 0
        parts = np.split(pixels, [image.width // 2], axis)
        found = [_read_object(part, background, outlines) for part, outlines in zip(parts, halves, strict=True)]
        overlaps = [overlap for _, _, overlap in found]
        if sum(overlaps) <= best:
            continue
        best = sum(overlaps)
        for prefix, (colour, closest, overlap) in zip(("", "other_"), found, strict=True):
            read[f"{prefix}colour"] = colour
            read[f"{prefix}shape"] = tuple(SHAPES)[closest] if overlap >= MIN_OVERLAP else None
        if min(overlaps) >= MIN_OVERLAP:  # no other relation fits as well
            beside = ~_surroundings(relation, str(read["shape"]), str(read["other_shape"]), image.width)
            stray = np.linalg.norm(pixels[beside] - background, axis=-1) > MAX_COLOUR_DISTANCE
            read["relation"] = relation if stray.sum() <= MAX_STRAY * image.width**2 else None
            break
    return read


def _background(pixels: np.ndarray) -> tuple[np.ndarray, str | None]:
    """The colour around the objects, and its name. None: it is not of the palette, or not of one colour."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    uniform = np.mean(np.linalg.norm(border - background, axis=-1) <= MAX_COLOUR_DISTANCE) > 0.5
    return background, _closest(background, BACKGROUNDS) if uniform else None


def _read_object(pixels: np.ndarray, background: np.ndarray, outlines: np.ndarray) -> tuple[str | None, int, float]:
    """(H, W, 3) and outlines (K, H, W) -> colour, index of the closest outline, overlap with it (0: no object)."""
    distance = np.linalg.norm(pixels - background, axis=-1)  # (H, W)
    if distance.max() < MAX_COLOUR_DISTANCE:
        return None, 0, 0.0
    inside = distance > 0.7 * np.quantile(distance, 0.98)
    colour = np.median(pixels[inside], axis=0)
    direction = (colour - background) / np.sum((colour - background) ** 2)
    coverage = np.clip((pixels - background) @ direction, 0, 1)  # (H, W), the covered fraction of each pixel
    closest = int(np.square(coverage - outlines).sum((1, 2)).argmin())
    generated, rendered = coverage > 0.5, outlines[closest] > 0.5
    overlap = (generated & rendered).sum() / (generated | rendered).sum()
    return _closest(colour, COLOURS), closest, float(overlap)


def _closest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    name = min(palette, key=lambda key: float(np.linalg.norm(colour - palette[key])))
    return name if np.linalg.norm(colour - palette[name]) <= MAX_COLOUR_DISTANCE else None


@functools.cache
def _outlines(resolution: int) -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """All (shape, size, position), and the fraction of each pixel that they cover, (40, R, R)."""
    keys = list(itertools.product(SHAPES, SIZES, POSITIONS))
    return keys, np.stack([_coverage(Scene("red", *key, "black"), resolution) for key in keys])


@functools.cache
def _pair_outlines(resolution: int) -> dict[str, list[np.ndarray]]:
    """Relation -> the outlines of all shapes in each half of an image, (4, R, R/2) or (4, R/2, R)."""
    return {
        relation: np.split(
            np.stack([_coverage(PairScene("red", shape, relation, "red", shape, "black"), resolution)
                      for shape in SHAPES]),
            [resolution // 2],
            axis,
        )
        for relation, axis in (("left of", 2), ("above", 1))
    }  # fmt: skip


@functools.cache
def _surroundings(relation: str, shape: str, other_shape: str, resolution: int) -> np.ndarray:
    """Where two objects are, and a sixteenth of the image's side around them, (R, R) of bool."""
    outline = _coverage(PairScene("red", shape, relation, "red", other_shape, "black"), resolution) > 0.5
    reach = max(1, resolution // 16)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(outline, reach), (2 * reach + 1, 2 * reach + 1))
    return np.asarray(windows.any((-2, -1)))


def _coverage(scene: Scene | PairScene, resolution: int) -> np.ndarray:
    """The fraction of each pixel that red objects on black cover."""
    red = np.array(COLOURS["red"], dtype=np.float64)
    return np.asarray(render(scene, resolution)) @ red / (red @ red)
