"""The reader is exact on what was rendered, says so when a picture is wrong, and claims nothing of noise."""

import numpy as np
import pytest
from PIL import Image

from tests.scenes import neighbours
from uvit.evaluate.shapes_reader import ATTRIBUTES, CHANCE, read_scene
from uvit.sources.shapes import Scene, render, scenes

EVERYTHING = [scene for split in ("train", "heldout") for scene in scenes(split) if isinstance(scene, Scene)]


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
    """27 dB, about the worst that a first stage is used with."""
    generator = np.random.default_rng(0)
    misread = 0
    for scene in EVERYTHING[::10]:
        pixels = np.asarray(render(scene, 32)) + generator.normal(0, 255 * 10 ** (-27 / 20), (32, 32, 3))
        misread += bool(wrong(scene, Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))))
    assert misread == 0


def test_it_claims_nothing_of_pictures_without_a_shape() -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert [read_scene(noise)[name] for name in ("shape", "size", "position")] == [None, None, None]
    plain = read_scene(Image.new("RGB", (32, 32), (255, 255, 255)))
    assert plain == {**dict.fromkeys(ATTRIBUTES), "background": "white"}
    assert set(read_scene(Image.new("RGB", (32, 32), (0, 200, 200))).values()) == {None}


def test_chance_is_one_in_the_number_of_choices() -> None:
    assert np.prod(list(CHANCE.values())) == pytest.approx(1 / 720)
