"""Bytes and fields become upright RGB images and clean captions, or a sentence that names what is wrong."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sources.pictures import png
from uvit.images import to_rgb
from uvit.sources.decode import caption_values, clean_captions, decode_image, decode_object, decode_text
from uvit.sources.names import image_formats
from uvit.sources.types import PairError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def kind_of(error: "pytest.ExceptionInfo[PairError]") -> str:
    assert "the file" in str(error.value)
    assert error.value.problem.left_out
    return error.value.problem.kind


# Images


def test_what_is_transparent_becomes_white() -> None:
    image = to_rgb(decode_image(png("#ff000000", mode="RGBA"), "a", "the file"))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert decode_image(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif), "a", "the file").size == (4, 6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_grey_is_grey_in_every_mode(mode: str) -> None:
    grey = Image.new("L", (8, 8), 128 if mode != "1" else 255)
    image = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)) if mode == "I;16" else grey.convert(mode)
    decoded = to_rgb(decode_image(encoded(image), "a", "the file"))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((3, 3)) == (255, 255, 255) if mode == "1" else (128, 128, 128)


@pytest.mark.parametrize("data", [b"", b"no image", png("red")[:-30], png("red")[:40]])
def test_broken_images(data: bytes) -> None:
    for _ in range(2):
        with pytest.raises(PairError, match=r"the image of a cannot be decoded \(\w") as error:
            decode_image(data, "a", "the file")
        assert kind_of(error) == "broken image"
        assert " 0x" not in str(error.value), "differs from run to run"


def test_no_other_program_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run the program in an EPS file."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "EPS"
    with pytest.raises(PairError, match="not an image format"):
        decode_image(data, "a", "the file")
    assert not (tmp_path / "ran").exists()


def test_formats_are_tried_in_the_same_order_in_every_process() -> None:
    """Some have no signature, and would claim others' files: a TGA begins as an ICO does."""
    assert image_formats() == tuple(name for name in Image.ID if name in image_formats())
    assert not {"EPS", "WMF"} & {*image_formats()}
    icon = encoded(Image.new("RGB", (160, 160), "red"), "ICO", sizes=[(160, 160)])
    assert to_rgb(decode_image(icon, "a", "the file")).getpixel((80, 80)) == (255, 0, 0)


def test_damage_of_any_kind_is_one_kind_of_error_and_no_warning() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    image, chance = Image.fromarray(pixels), random.Random(0)
    outcomes = set()
    for format in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = encoded(image, format, **({} if format == "GIF" else {"exif": exif}))
        for _ in range(200):
            data = bytearray(whole)
            for _ in range(chance.choice([1, 8])):
                data[chance.randrange(min(len(data), chance.choice([64, 10**6])))] = chance.randrange(256)
            try:
                outcomes.add(to_rgb(decode_image(bytes(data), "a", "the file")).mode)
            except PairError as error:
                outcomes.add(error.problem.kind)
    assert outcomes == {"RGB", "broken image"}


# Captions


def test_text_with_a_byte_order_mark() -> None:
    assert decode_text("\ufeff红色".encode(), "a", "the file") == "红色"
    with pytest.raises(PairError) as error:
        decode_text(b"\xff\xfe", "a", "the file")
    assert kind_of(error) == "not UTF-8"


@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', "[" * 100_000])
def test_broken_json(text: str) -> None:
    with pytest.raises(PairError) as error:
        decode_object(text, "a", "the file")
    assert kind_of(error) == "broken JSON"


def test_values_come_from_the_first_key_that_has_one() -> None:
    keys = ("text", "captions")
    assert caption_values({"captions": ["one", "two"], "text": "three"}, keys, "a", "the file") == ["three"]
    assert caption_values({"captions": ["one", "two"], "text": None}, keys, "a", "the file") == ["one", "two"]
    for row in ({}, {"label": "x"}, {"text": 3}, {"text": None}, {"captions": ["one", 2]}, {"text": {"en": "one"}}):
        with pytest.raises(PairError, match=r"needs text or captions") as error:
            caption_values(row, keys, "a", "the file")
        assert kind_of(error) == "no caption"


def test_captions_are_stripped_and_empty_ones_left_out_and_told() -> None:
    assert clean_captions([" one\n", "two"], "a", "the file") == (("one", "two"), ())
    captions, (problem,) = clean_captions(["one", " ", ""], "a", "the file")
    assert captions == ("one",)
    assert (problem.kind, problem.left_out) == ("empty caption", False)
    assert "2 of 3 captions" in problem.message
    for given, says in ([], "has no caption"), (["", " "], "has only empty captions"):
        with pytest.raises(PairError, match=says) as error:
            clean_captions(given, "a", "the file")
        assert kind_of(error) == "no caption"
    with pytest.raises(PairError) as error:
        clean_captions(["half \ud83d"], "a", "the file")
    assert kind_of(error) == "not UTF-8"
