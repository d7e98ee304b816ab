"""The built-in pairs: deterministic, distinct, compositional, and held out where they should be."""

import numpy as np
import pytest

from tests.scenes import neighbours
from uvit.sources.shapes import PairScene, Scene, ShapesSource, render, scenes


@pytest.mark.parametrize(("num_objects", "total"), [(1, 720), (2, 6624)])
def test_the_splits_share_nothing_and_leave_out_nothing(num_objects: int, total: int) -> None:
    train, heldout = scenes("train", num_objects), scenes("heldout", num_objects)
    assert len(heldout) == total // 10 and len(train) + len(heldout) == total
    assert len(set(train) | set(heldout)) == total
    captions = [{caption for scene in split for caption in scene.captions()} for split in (train, heldout)]
    assert not captions[0] & captions[1]


def test_every_attribute_of_a_held_out_scene_is_seen_in_training() -> None:
    train = [vars(scene) for scene in scenes("train")]
    for scene in scenes("heldout"):
        for name, value in vars(scene).items():
            assert any(other[name] == value for other in train)


def test_every_scene_looks_different() -> None:
    pictures = {render(scene, 32).tobytes() for split in ("train", "heldout") for scene in scenes(split)}
    assert len(pictures) == 720


def test_a_scene_has_its_neighbours() -> None:
    scene = scenes("train")[0]
    assert isinstance(scene, Scene)
    assert len(neighbours(scene)) == 5 + 3 + 1 + 4 + 2


def test_rendering_puts_colours_where_the_words_say() -> None:
    red_left = render(PairScene("red", "square", "left of", "blue", "circle", "white"), 64)
    pixels = np.asarray(red_left)
    assert tuple(pixels[32, 17]) == (220, 40, 40) and tuple(pixels[32, 46]) == (50, 80, 220)
    assert tuple(pixels[0, 0]) == (255, 255, 255)


def test_a_source_is_the_same_each_time() -> None:
    one, other = ShapesSource("train", 32), ShapesSource("train", 32)
    assert len(one) == 648 and one[5].captions == other[5].captions
    assert one[5].image.tobytes() == other[5].image.tobytes() and one[5].image.size == (32, 32)
    assert len({one[i].id for i in range(len(one))}) == len(one)
