"""Contact sheets show the first images, those of each category, and the real images nearest to them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uvit.evaluate.features import FeatureSet
from uvit.evaluate.image_sets import FolderImages, Preparation
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.sheets import write_neighbours, write_sheets

COLOURS = ["red", "lime", "blue", "white"]


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{number}.png" for number in range(4)]
    for name, colour in zip(names, COLOURS, strict=True):
        Image.new("RGB", (16, 16), colour).save(folder / name)
    return FolderImages(folder, names, Preparation(None, "center", "lanczos", "srgb"))


def features_of(vectors: list[list[float]]) -> FeatureSet:
    array = np.array(vectors, np.float32)
    return FeatureSet({"features": array}, np.arange(len(array)), [str(i) for i in range(len(array))], [], "")


def colours_in(path: Path) -> set[tuple[int, ...]]:
    return {
        colour for _, colour in Image.open(path).getcolors(2**20) if colour in {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
    }


def test_the_first_images_and_a_sheet_for_each_category(tmp_path: Path, images: FolderImages) -> None:
    prompts = [Prompt("a", "0", "one"), Prompt("b", "1", "two/2"), Prompt("c", "2", "one"), Prompt("d", "3")]
    write_sheets(tmp_path, images, prompts)
    assert colours_in(tmp_path / "contact_sheet.png") == {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
    assert colours_in(tmp_path / "sheets" / "00-one.png") == {(255, 0, 0), (0, 0, 255)}
    assert colours_in(tmp_path / "sheets" / "01-two-2.png") == {(0, 255, 0)}


def test_an_image_that_cannot_be_read_is_grey(tmp_path: Path, images: FolderImages) -> None:
    (images.folder / "0.png").write_bytes(b"no image")
    write_sheets(tmp_path, images, [])
    assert colours_in(tmp_path / "contact_sheet.png") == {(0, 255, 0), (0, 0, 255)}
    assert (128, 128, 128) in {colour for _, colour in Image.open(tmp_path / "contact_sheet.png").getcolors(2**20)}


def test_the_nearest_real_image_stands_beside_its_copy(tmp_path: Path, images: FolderImages) -> None:
    generated = features_of([[0, 0, 2]])  # 0.png, near to 2.png of the real ones
    real = features_of([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    write_neighbours(tmp_path, images, generated, images, real)
    sheet = np.asarray(Image.open(tmp_path / "neighbours.png"))
    columns = [np.flatnonzero((sheet == colour).all(-1).any(0)).min() for colour in ((255, 0, 0), (0, 0, 255))]
    width = sheet.shape[1] / 5  # the image, and four real ones
    assert columns[0] < width <= columns[1] < 2 * width
