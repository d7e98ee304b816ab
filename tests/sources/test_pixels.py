"""The pixels of an image are what its file says, as 8-bit sRGB on white; or a sentence says why they are not read."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.sources.image_files import (
    BLACK_IS_ZERO,
    CIELAB,
    CMYK,
    FLOAT,
    P3_PRIMARIES,
    RGB,
    SIGNED,
    SRGB_PRIMARIES,
    WHITE_IS_ZERO,
    YCBCR,
    cmyk_profile,
    grey_profile,
    matrix_profile,
    png_file,
    tiff_file,
)
from uvit.images import to_rgb
from uvit.sources.decode import decode_image
from uvit.sources.types import PairError

WHITE, RED = (255, 255, 255), (255, 0, 0)
DEEP = np.array([[0, 128 * 257, 65535]], np.uint16)  # black, the middle grey and white
FLOATS = np.array([[0, 0.5, 1]], np.float32)
GREYS = [(0, 0, 0), (128, 128, 128), WHITE]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def one(mode: str, *colours: Any) -> Image.Image:
    """A row of pixels."""
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


def rows(*pixels: Any, dtype: Any = np.uint8) -> np.ndarray:
    return np.array([pixels], dtype)


def palette_with_alpha() -> Image.Image:
    image = one("P", 0, 1, 2)
    image.putpalette([255, 0, 0, 0, 0, 0, 0, 0, 255])
    return image


FILES: dict[str, tuple[bytes, list[Any]]] = {
    # Grey
    "1": (encoded(one("1", 0, 255)), [(0, 0, 0), WHITE]),
    "PBM": (b"P1 2 1\n1 0\n", [(0, 0, 0), WHITE]),
    "L": (encoded(one("L", 0, 7, 255)), [(0, 0, 0), (7, 7, 7), WHITE]),
    "2-bit PNG": (png_file([[0, 1, 3]], 2, 0), [(0, 0, 0), (85, 85, 85), WHITE]),
    "16-bit PNG": (encoded(Image.fromarray(DEEP)), GREYS),
    "16-bit PNG with alpha": (png_file([[32896, 65535, 0, 0]], 16, 4), [(128, 128, 128), WHITE]),
    "16-bit PGM": (b"P5 3 1 65535\n" + DEEP.astype(">u2").tobytes(), GREYS),
    "10-bit PGM": (b"P5 3 1 1023\n" + np.array([0, 514, 1023], ">u2").tobytes(), GREYS),
    "PGM up to 100": (b"P5 3 1 100\n\0\x32\x64", GREYS),
    "16-bit JPEG 2000": (encoded(Image.fromarray(DEEP.repeat(8, 0)), "JPEG2000"), GREYS),
    "16-bit TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), GREYS),
    "16-bit TIFF, big-endian": (encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), GREYS),
    "16-bit TIFF, LZW": (encoded(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), GREYS),
    "16-bit TIFF, white is 0": (tiff_file(65535 - DEEP, WHITE_IS_ZERO), GREYS),
    "8-bit TIFF, white is 0": (tiff_file(rows(255, 127, 0), WHITE_IS_ZERO), GREYS),
    "12-bit TIFF": (tiff_file(rows(0, 2056, 4095, dtype=np.int64), BLACK_IS_ZERO), GREYS),
    "float TIFF": (tiff_file(FLOATS, BLACK_IS_ZERO, FLOAT), GREYS),
    "float TIFF, white is 0": (tiff_file(1 - FLOATS, WHITE_IS_ZERO, FLOAT), GREYS),
    "PFM": (b"Pf\n3 1\n-1.0\n" + FLOATS.tobytes(), GREYS),
    # Colours
    "RGB": (encoded(one("RGB", (1, 2, 3))), [(1, 2, 3)]),
    "16-bit RGB PNG": (png_file([[257, 514, 771]], 16, 2), [(1, 2, 3)]),
    "16-bit RGB TIFF": (tiff_file(rows((257, 514, 771), dtype=np.uint16), RGB), [(1, 2, 3)]),
    "16-bit PPM": (b"P6 1 1 65535\n" + DEEP.astype(">u2").tobytes(), [(0, 128, 255)]),
    "P": (encoded(palette_with_alpha()), [RED, (0, 0, 0), (0, 0, 255)]),
    "RGBX TIFF": (tiff_file(rows((1, 2, 3, 0)), RGB, extra=0), [(1, 2, 3)]),
    "CMYK TIFF": (tiff_file(rows((0, 255, 255, 0), (0, 0, 0, 255)), CMYK), [RED, (0, 0, 0)]),
    "16-bit CMYK TIFF": (tiff_file(rows((0, 65535, 65535, 0), dtype=np.uint16), CMYK), [RED]),
    "YCbCr TIFF": (tiff_file(rows((255, 128, 128), (0, 128, 128)), YCBCR), [WHITE, (0, 0, 0)]),
    "LAB TIFF": (tiff_file(rows((255, 0, 0), (128, 0, 0), (136, 80, 67)), CIELAB), [WHITE, (119,) * 3, (251, 0, 8)]),
    # Transparency
    "LA": (encoded(one("LA", (0, 0), (9, 255))), [WHITE, (9, 9, 9)]),
    "RGBA": (encoded(one("RGBA", (0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 128))), [WHITE, RED, (127, 127, 127)]),
    "WebP": (encoded(one("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)), "WEBP", lossless=True), [WHITE, RED]),
    "GIF": (encoded(palette_with_alpha(), "GIF", transparency=0), [WHITE, (0, 0, 0), (0, 0, 255)]),
    "P, one colour": (encoded(palette_with_alpha(), transparency=0), [WHITE, (0, 0, 0), (0, 0, 255)]),
    "P, an alpha for each": (
        encoded(palette_with_alpha(), transparency=b"\0\x80\xff"),
        [WHITE, (127,) * 3, (0, 0, 255)],
    ),
    "TIFF, alpha": (tiff_file(rows((1, 2, 3, 0), (1, 2, 3, 255)), RGB, extra=2), [WHITE, (1, 2, 3)]),
    "TIFF, premultiplied": (tiff_file(rows((0, 0, 128, 128)), RGB, extra=1), [(127, 127, 255)]),
    "TIFF, grey and alpha": (tiff_file(rows((9, 0), (9, 255)), BLACK_IS_ZERO, extra=2), [WHITE, (9, 9, 9)]),
    **{
        f"{bits}-bit grey PNG, one level": (
            png_file([[0, 1, 2**bits - 1]], bits, 0, transparent=[1]),
            [(0, 0, 0), WHITE, WHITE],
        )
        for bits in (1, 2, 4, 8, 16)
    },
    "RGB PNG, one colour": (png_file([[1, 2, 3, 1, 2, 4]], 8, 2, transparent=[1, 2, 3]), [WHITE, (1, 2, 4)]),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_what_the_file_says(name: str) -> None:
    data, expected = FILES[name]
    image = to_rgb(decode_image(data, "a", "the file"))
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_jpegs(mode: str) -> None:
    """Those of four channels are inverted, as Adobe's."""
    colour, expected = {"CMYK": ((0, 255, 255, 0), RED), "RGB": (RED, RED), "L": (200, (200,) * 3)}[mode]
    data = encoded(Image.new(mode, (8, 8), colour), "JPEG", quality=95)
    pixel = np.asarray(to_rgb(decode_image(data, "a", "the file")))[4, 4]
    assert np.abs(pixel.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (tiff_file(DEEP.astype(np.int16), BLACK_IS_ZERO, SIGNED), "its integers are signed"),
        (tiff_file(rows(1, 2), BLACK_IS_ZERO, SIGNED), "its integers are signed"),
        (tiff_file(DEEP.astype(np.uint32), BLACK_IS_ZERO), "its integers have 32 bits"),
        (tiff_file(255 * FLOATS, BLACK_IS_ZERO, FLOAT), r"floats are 0 to 255, and only .* convert it"),
        (tiff_file(FLOATS - 1, BLACK_IS_ZERO, FLOAT), r"floats are -1 to 0, and only .* convert it"),
        (tiff_file(FLOATS * np.nan, BLACK_IS_ZERO, FLOAT), r"floats are nan to nan"),
        (
            tiff_file(FLOATS.astype(np.float64), BLACK_IS_ZERO, FLOAT),
            "kind of pixels, that Pillow can read; convert it",
        ),
        (
            tiff_file(rows((0, 0.5, 1), dtype=np.float32), RGB, FLOAT),
            "kind of pixels, that Pillow can read; convert it",
        ),
        (png_file([[256, 512, 768]], 16, 2, transparent=[256, 512, 768]), "a transparent colour; convert it to RGBA"),
    ],
)
def test_pixels_of_unknown_meaning_are_not_guessed(data: bytes, says: str) -> None:
    with pytest.raises(PairError, match=says) as error:
        decode_image(data, "a", "the file")
    assert error.value.problem.kind == "broken image"


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "CMYK", "F"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_kind_of_pixels(mode: str, orientation: int) -> None:
    upright = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    turn = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T}
    turn |= {6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1]}
    stored = turn[orientation]
    as_stored = {
        "L": (stored, BLACK_IS_ZERO, 1),
        "I;16": (stored.astype(np.uint16) * 257, BLACK_IS_ZERO, 1),
        "RGB": (np.stack([stored] * 3, axis=-1), RGB, 1),
        "CMYK": (np.stack([255 - stored] * 3 + [0 * stored], axis=-1), CMYK, 1),
        "F": ((stored / 255).astype(np.float32), BLACK_IS_ZERO, FLOAT),
    }
    pixels, photometric, kind = as_stored[mode]
    data = tiff_file(np.ascontiguousarray(pixels), photometric, kind, orientation=orientation)
    assert np.array_equal(np.asarray(to_rgb(decode_image(data, "a", "the file")))[..., 0], upright)


def test_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert to_rgb(decode_image(data, "a", "the file")).getpixel((1, 1)) == RED, format


# Profiles

COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8)[None]


def srgb_levels(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def decoded(pixels: np.ndarray | Image.Image, profile: bytes, format: str = "PNG", icc: str = "srgb") -> np.ndarray:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = encoded(image, format, icc_profile=profile)
    return np.asarray(to_rgb(decode_image(data, "a", "the file"), icc)).astype(int)


@pytest.mark.parametrize(("primaries", "gamma"), [(P3_PRIMARIES, 2.2), (SRGB_PRIMARIES, 1.0), (P3_PRIMARIES, 1.8)])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_rgb_profiles(primaries: Any, gamma: float, format: str) -> None:
    light = (COLOURS / 255) ** (round(gamma * 256) / 256) @ np.array(primaries)
    expected = srgb_levels(light @ np.linalg.inv(np.array(SRGB_PRIMARIES)))
    image, profile = Image.fromarray(COLOURS), matrix_profile(primaries, gamma)
    data = encoded(image, format, icc_profile=profile, **({"lossless": True} if format == "WEBP" else {}))
    found = np.asarray(to_rgb(decode_image(data, "a", "the file"))).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert np.array_equal(to_rgb(decode_image(data, "a", "the file"), "ignore"), COLOURS)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_grey_profiles(gamma: float) -> None:
    expected = srgb_levels((RAMP / 255) ** (round(gamma * 256) / 256))
    profile = grey_profile(gamma)
    for pixels in (RAMP, RAMP.astype(np.uint16) * 257):
        found = decoded(pixels, profile)
        assert np.abs(found - expected[..., None]).max() <= 1
        assert np.array_equal(decoded(pixels, profile, icc="ignore")[..., 0], RAMP)


def test_cmyk_profiles() -> None:
    inks = Image.new("CMYK", (2, 2), (255, 0, 0, 255))  # by the profile, magenta and yellow alone
    found = decoded(inks, cmyk_profile(), "TIFF")
    assert (found[..., 0] > 240).all()
    assert (found[..., 1:] < 15).all()
    assert (decoded(inks, cmyk_profile(), "TIFF", icc="ignore") == 0).all()


def test_profiles_of_palettes_and_with_transparency() -> None:
    linear = matrix_profile(SRGB_PRIMARIES, 1.0)
    assert decoded(one("RGBA", (55, 55, 55, 255), (55, 55, 55, 0)), linear)[0, :, 0].tolist() == [128, 255]
    assert decoded(one("LA", (55, 255), (55, 0)), grey_profile(1.0))[0, :, 0].tolist() == [128, 255]
    palette = one("P", 0, 1)
    palette.putpalette([55, 55, 55, 0, 0, 0])
    assert decoded(palette, linear)[0, :, 0].tolist() == [128, 0]


def test_srgb_profiles_change_nothing() -> None:
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),):
        assert np.array_equal(decoded(COLOURS, profile), COLOURS)


@pytest.mark.parametrize(
    "profile",
    [b"no profile", matrix_profile(P3_PRIMARIES, 2.2)[:200], bytes(200), grey_profile(1.0), cmyk_profile()],
    ids=["words", "cut short", "zeros", "of grey", "of inks"],
)
def test_profiles_that_are_damaged_or_of_other_channels_are_ignored(profile: bytes) -> None:
    assert np.array_equal(decoded(COLOURS, profile), COLOURS)
