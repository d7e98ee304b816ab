"""The reader is exact on what was rendered, says so when a picture is wrong, and claims nothing of noise."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.scenes import neighbours
from uvit.evaluate.shapes_reader import Read, read_pair_scene, read_scene
from uvit.sources.shapes import BACKGROUNDS, COLOURS, PairScene, Scene, render, scenes

ATTRIBUTES = [field.name for field in fields(Scene)]
EVERYTHING = [scene for split in ("train", "heldout") for scene in scenes(split) if isinstance(scene, Scene)]
# Each image once: "A right of B" is the same as "B left of A".
PAIRS = [
    scene
    for split in ("train", "heldout")
    for scene in scenes(split, 2)
    if isinstance(scene, PairScene) and scene.relation in ("left of", "above")
]
NOISE = 255 * 10 ** (-27 / 20)  # 27 dB, about the worst that a first stage is used with


def noisy(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image) + generator.normal(0, NOISE, (image.height, image.width, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def wrong(scene: Scene, image: Image.Image) -> list[str]:
    read = read_scene(image)
    return [name for name in ATTRIBUTES if read[name] != getattr(scene, name)]


@pytest.mark.parametrize("resolution", [32, 64])
def test_it_reads_every_rendered_scene(resolution: int) -> None:
    assert not [scene for scene in EVERYTHING if wrong(scene, render(scene, resolution))]


def test_it_finds_the_one_attribute_that_is_wrong() -> None:
    for scene in EVERYTHING[::24]:
        for other in neighbours(scene):
            [changed] = [name for name in ATTRIBUTES if getattr(other, name) != getattr(scene, name)]
            assert wrong(scene, render(other, 32)) == [changed]


def test_it_reads_through_the_noise_of_a_first_stage() -> None:
    generator = np.random.default_rng(0)
    assert not [scene for scene in EVERYTHING[::10] if wrong(scene, noisy(render(scene, 32), generator))]


def test_it_claims_nothing_of_pictures_without_a_shape() -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for read in (read_scene, read_pair_scene):
        assert set(read(noise).values()) == {None}
        plain = read(noisy(Image.new("RGB", (32, 32), (250, 250, 250)), generator))
        assert plain.pop("background") == "white" and set(plain.values()) == {None}
        assert set(read(Image.new("RGB", (32, 32), (0, 200, 200))).values()) == {None}
        assert set(read(Image.linear_gradient("L").resize((32, 32))).values()) == {None}


# Two objects


@pytest.mark.parametrize("resolution", [32, 64])
def test_it_reads_every_rendered_pair(resolution: int) -> None:
    assert len(PAIRS) == 3312
    assert not [scene for scene in PAIRS if read_pair_scene(render(scene, resolution)) != asdict(scene)]


@pytest.mark.parametrize("resolution", [16, 33, 100])
def test_it_reads_pairs_at_other_resolutions(resolution: int) -> None:
    assert not [scene for scene in PAIRS[::40] if read_pair_scene(render(scene, resolution)) != asdict(scene)]


def test_both_descriptions_of_a_pair_are_one_image() -> None:
    one = PairScene("red", "circle", "left of", "blue", "cross", "grey")
    for relation, converse in (("left of", "right of"), ("above", "below")):
        first = replace(one, relation=relation)
        other = PairScene("blue", "cross", converse, "red", "circle", "grey")
        assert render(first, 32).tobytes() == render(other, 32).tobytes()
        assert read_pair_scene(render(other, 32)) == asdict(first)


@pytest.mark.parametrize("resolution", [32, 64])
def test_it_reads_pairs_through_noise_and_blur(resolution: int) -> None:
    generator = np.random.default_rng(0)
    for scene in PAIRS[::15]:
        image = render(scene, resolution)
        for worse in (noisy(image, generator), image.filter(ImageFilter.GaussianBlur(resolution / 40))):
            assert read_pair_scene(worse) == asdict(scene)


Object = tuple[str, tuple[float, float], float]  # colour, centre and radius as shares of the image's side


def circles(objects: Sequence[Object], resolution: int = 64) -> Read:
    image = Image.new("RGB", (8 * resolution, 8 * resolution), BACKGROUNDS["white"])
    draw = ImageDraw.Draw(image)
    for colour, centre, radius in objects:
        x, y, r = (8 * resolution * value for value in (*centre, radius))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    return read_pair_scene(image.resize((resolution, resolution), Image.Resampling.BOX))


LEFT: Object = ("red", (0.27, 0.5), 0.2)
RIGHT: Object = ("blue", (0.73, 0.5), 0.2)


@pytest.mark.parametrize("resolution", [32, 64])
def test_one_object_stands_in_no_relation(resolution: int) -> None:
    nothing = {"relation": None, "other_colour": None, "other_shape": None}
    assert circles([LEFT], resolution) == {"colour": "red", "shape": "circle", **nothing, "background": "white"}
    right = circles([RIGHT], resolution)
    assert (right["colour"], right["shape"], right["relation"]) == (None, None, None)
    assert (right["other_colour"], right["other_shape"]) == ("blue", "circle")
    for scene in EVERYTHING:
        read = read_pair_scene(render(scene, 32))
        assert (read["shape"], read["relation"], read["other_shape"]) == (None, None, None)


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize(
    "third",
    [
        ("green", (0.5, 0.27), 0.2),
        ("red", (0.5, 0.73), 0.2),
        ("green", (0.5, 0.85), 0.1),
        ("blue", (0.9, 0.1), 0.08),
        ("yellow", (0.5, 0.1), 0.08),
    ],
)
def test_three_objects_stand_in_no_relation(third: Object, resolution: int) -> None:
    assert circles([LEFT, RIGHT], resolution)["relation"] == "left of"
    assert circles([LEFT, RIGHT, third], resolution)["relation"] is None


def test_objects_that_are_elsewhere_stand_in_no_relation() -> None:
    for places in (((0.27, 0.27), (0.73, 0.73)), ((0.5, 0.5), (0.5, 0.5)), ((0.27, 0.27), (0.73, 0.27))):
        assert circles([("red", places[0], 0.2), ("blue", places[1], 0.2)])["relation"] is None
    assert circles([("red", (0.3, 0.47), 0.2), ("blue", (0.7, 0.53), 0.18)])["relation"] == "left of"  # almost there
