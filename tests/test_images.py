"""Images keep their values and places on the way between files, arrays and tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uvit import images

LEFTS = [0, 7, 4, 7, 7, 2, 6, 2]  # what sha256 of "0", "1", ... says


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_pixel_value_survives_the_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3).transpose(0, 3, 1, 2)
    unit = images.to_unit(pixels)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1, 1)
    assert np.array_equal(images.to_uint8(unit).numpy(), pixels)
    assert np.array_equal(np.asarray(images.to_pil(unit)[0]), pixels[0].transpose(1, 2, 0))


def test_values_out_of_range_are_clamped() -> None:
    assert images.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@settings(max_examples=30, deadline=None)
@given(width=st.integers(8, 40), height=st.integers(8, 40))
def test_to_pixels_takes_the_central_square(width: int, height: int) -> None:
    image = noise_image(width, height)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    wanted = np.asarray(image)[top : top + side, left : left + side].transpose(2, 0, 1)
    assert np.array_equal(images.to_pixels(image, side), wanted)
    scaled = images.to_pixels(image, 16)
    assert scaled.shape == (3, 16, 16)
    assert scaled.dtype == np.uint8


def test_the_default_is_the_preprocessing_of_the_official_code() -> None:
    folder = Path(__file__).parent / "fixtures" / "center_crop"
    with Image.open(folder / "input.png") as image, Image.open(folder / "uvit_64.png") as expected:
        assert np.array_equal(images.to_pixels(image, 64), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (400, 16), (17, 200), (32, 31)])
@pytest.mark.parametrize("resize", images.FILTERS)
@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_pixels_beside_the_square_change_nothing(width: int, height: int, resize: str, resolution: int) -> None:
    image, side = noise_image(width, height), min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((resolution, resolution), images.FILTERS[resize])).transpose(2, 0, 1)
    assert np.array_equal(images.to_pixels(image, resolution, resize=resize), expected)
    framed = Image.new("RGB", image.size, "red")
    framed.paste(square, (left, top))
    assert np.array_equal(images.to_pixels(framed, resolution, resize=resize), expected)


@pytest.mark.parametrize(
    ("size", "box"), [((8, 8), (4, 0, 36, 32)), ((32, 64), (12, 0, 28, 32)), ((40, 8), (0, 12, 40, 20))]
)
def test_a_center_crop_has_the_proportions_of_its_size(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = noise_image(40, 32)
    expected = image.crop(box).resize(size, Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(images.center_crop(image, size)), np.asarray(expected))


@pytest.mark.parametrize("crop", ["center", "random", "stretch"])
@pytest.mark.parametrize("resize", images.FILTERS)
def test_a_plain_colour_stays_plain_at_any_size(crop: str, resize: str) -> None:
    pixels = images.to_pixels(Image.new("RGB", (50, 31), (10, 200, 30)), 16, crop, resize)
    assert (pixels == np.array([10, 200, 30], dtype=np.uint8)[:, None, None]).all()


@settings(max_examples=30, deadline=None)
@given(width=st.integers(8, 40), height=st.integers(8, 40), key=st.text(max_size=5))
def test_a_random_square_lies_in_the_image_and_its_key_says_where(width: int, height: int, key: str) -> None:
    image, side = noise_image(width, height), min(width, height)
    pixels = images.to_pixels(image, side, "random", key=key)
    array = np.asarray(image).transpose(2, 0, 1)
    squares = [array[:, y : y + side, x : x + side] for y in range(height - side + 1) for x in range(width - side + 1)]
    assert any(np.array_equal(pixels, square) for square in squares)
    assert np.array_equal(pixels, images.to_pixels(image, side, "random", key=key))


def test_random_squares_are_all_over_the_image_and_the_same_on_every_machine() -> None:
    across = np.zeros((4, 12, 3), dtype=np.uint8)
    across[:, :, 0] = np.arange(12)
    image = Image.fromarray(across)
    lefts = [int(images.to_pixels(image, 4, "random", key=str(i))[0, 0, 0]) for i in range(300)]
    assert set(lefts) == set(range(9))
    assert lefts[:8] == LEFTS


def test_padding_shows_all_of_the_image_between_white_bars() -> None:
    pixels = images.to_pixels(Image.new("RGB", (40, 20)), 16, "pad")
    black = (pixels == 0).all(axis=0)
    assert black[4:12].all()
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 12:] == 255).all()
    assert images.to_pixels(Image.new("RGB", (400, 1)), 16, "pad").min() == 0


def test_stretching_shows_all_of_the_image() -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    pixels = images.to_pixels(image, 16, "stretch", "box")
    assert (pixels[:, :, :8] == 0).all()
    assert (pixels[:, :, 8:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    assert images.to_rgb(image).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert images.to_pixels(Image.new(mode, (8, 8)), 8).shape == (3, 8, 8)


def test_contact_sheet_places_images_in_rows() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = images.contact_sheet([Image.new("RGB", (32, 32), colour) for colour in colours], columns=2, cell=32)
    found = [colour for _, colour in sheet.getcolors(1 << 16) or []]
    assert set(colours) <= set(found)
    gap = 2
    assert sheet.getpixel((gap + 5, gap + 5)) == colours[0]
    assert sheet.getpixel((2 * gap + 32 + 5, gap + 5)) == colours[1]
    assert sheet.getpixel((gap + 5, 2 * gap + 32 + 5)) == colours[2]


def test_labels_make_the_sheet_taller_and_are_drawn() -> None:
    pictures = [Image.new("RGB", (64, 64), "white")] * 2
    plain = images.contact_sheet(pictures, columns=2, cell=64)
    labelled = images.contact_sheet(
        pictures, ["a red circle", "a long label of very many words indeed"], columns=2, cell=64
    )
    assert labelled.height > plain.height
    assert labelled.width == plain.width
    assert np.asarray(labelled).min() < 128, "no letter was drawn"


def test_headings_stand_above_their_columns() -> None:
    pictures = [Image.new("RGB", (64, 64), "white")] * 4
    plain = images.contact_sheet(pictures, columns=2, cell=64)
    headed = images.contact_sheet(pictures, columns=2, cell=64, headings=["", "second"])
    extra = headed.height - plain.height
    assert extra > 0
    assert np.array_equal(np.asarray(headed)[-plain.height + 2 :], np.asarray(plain)[2:])
    above = np.asarray(headed)[:extra].min(axis=(0, 2))
    assert above[: headed.width // 2].min() > 200, "the first column has no heading"
    assert above[headed.width // 2 :].min() < 128, "no letter was drawn"


def test_save_png_keeps_pixels_and_text(tmp_path: Path) -> None:
    image, path = noise_image(9, 7), tmp_path / "new" / "picture.png"
    images.save_png(image, path, {"prompt": "ein gelber Stern ★"})
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(again), np.asarray(image))
        assert again.text == {"prompt": "ein gelber Stern ★"}  # type: ignore[attr-defined]
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
