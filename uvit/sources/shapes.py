"""Built-in captioned images: shapes with a colour, a size, a position and a background.

All images are rendered deterministically. A tenth of the combinations is held out, to test a model on prompts that it
has never seen. `uvit.evaluate.shapes_reader` reads the attributes back from pixels.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from uvit.sources.types import Pair, Problem, RandomAccessSource

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 135, 30),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.15, "large": 0.25}  # radius as a share of the image's side
POSITIONS = {  # centre as a share of the image's side, (x, y)
    "in the centre": (0.5, 0.5),
    "at the top left": (0.27, 0.27),
    "at the top right": (0.73, 0.27),
    "at the bottom left": (0.27, 0.73),
    "at the bottom right": (0.73, 0.73),
}
RELATIONS = {  # centres of the first and the second object
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
PAIR_RADIUS = 0.2
SUPERSAMPLING = 8


@dataclass(frozen=True)
class Scene:
    """One object. The fields are its attributes in the captions."""

    colour: str
    shape: str
    size: str
    position: str
    background: str

    def objects(self) -> list[tuple[str, str, float, tuple[float, float]]]:
        return [(self.colour, self.shape, SIZES[self.size], POSITIONS[self.position])]

    def captions(self) -> tuple[str, ...]:
        c, s, z, p, b = self.colour, self.shape, self.size, self.position, self.background
        return (
            f"a {z} {c} {s} {p} on a {b} background",
            f"on a {b} background, a {z} {c} {s} {p}",
            f"{p} there is a {z} {s}, coloured {c}, on {b}",
            f"{z} {c} {s}, {p}, {b} background",
        )


@dataclass(frozen=True)
class PairScene:
    """Two objects and how the first stands to the second."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str
    background: str

    def objects(self) -> list[tuple[str, str, float, tuple[float, float]]]:
        first, second = RELATIONS[self.relation]
        return [
            (self.colour, self.shape, PAIR_RADIUS, first),
            (self.other_colour, self.other_shape, PAIR_RADIUS, second),
        ]

    def captions(self) -> tuple[str, ...]:
        one = f"{article(self.colour)} {self.colour} {self.shape}"
        two = f"{article(self.other_colour)} {self.other_colour} {self.other_shape}"
        return (
            f"{one} {self.relation} {two} on a {self.background} background",
            f"on {self.background}: {one} {self.relation} {two}",
            f"{one} is {self.relation} {two}, {self.background} background",
        )


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def scenes(split: str, num_objects: int = 1) -> list[Scene | PairScene]:
    """All combinations of a split, `train` (nine tenths) or `heldout`, in an order without pattern."""
    everything: list[Scene | PairScene]
    if num_objects == 1:
        everything = [Scene(*combo) for combo in itertools.product(COLOURS, SHAPES, SIZES, POSITIONS, BACKGROUNDS)]
    else:
        combos = itertools.product(COLOURS, SHAPES, RELATIONS, COLOURS, SHAPES, BACKGROUNDS)
        everything = [PairScene(*combo) for combo in combos if (combo[0], combo[1]) != (combo[3], combo[4])]
    order = np.random.Generator(np.random.Philox(key=[2023, num_objects])).permutation(len(everything))
    num_heldout = len(everything) // 10
    chosen = order[:num_heldout] if split == "heldout" else order[num_heldout:]
    return [everything[i] for i in chosen]


@functools.lru_cache(maxsize=4096)
def render(scene: Scene | PairScene, resolution: int) -> Image.Image:
    """The scene as an RGB image of `resolution` pixels a side, anti-aliased."""
    side = resolution * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for colour, shape, radius, (x, y) in scene.objects():
        _draw(draw, shape, COLOURS[colour], x * side, y * side, radius * side)
    return image.resize((resolution, resolution), Image.Resampling.BOX)


def _draw(draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], x: float, y: float, r: float) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        half = 0.88 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        angles = [math.radians(degrees) for degrees in (-90, 30, 150)]
        draw.polygon([(x + 1.15 * r * math.cos(a), y + 0.25 * r + 1.15 * r * math.sin(a)) for a in angles], fill=fill)
    else:
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


class ShapesSource(RandomAccessSource):
    """The built-in pairs of a split as a source."""

    def __init__(self, split: str, resolution: int, num_objects: int = 1):
        self.scenes = scenes(split, num_objects)
        self.resolution = resolution
        self.name = f"shapes-{split}-{num_objects}"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Pair:
        scene = self.scenes[index]
        return Pair(f"{self.name}-{index:05d}", render(scene, self.resolution), scene.captions())

    def captions(self, index: int) -> tuple[str, ...]:
        return self.scenes[index].captions()

    def problems(self) -> list[Problem]:
        return []
