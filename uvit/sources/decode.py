"""Decode the bytes and fields of any source to images and captions. Raises PairError if that is impossible."""

import ast
import contextlib
import io
import json
import re
import tokenize
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from uvit.errors import a_type
from uvit.images import DEEP_GREY, to_channels
from uvit.sources.names import image_formats
from uvit.sources.types import PairError, Problem

CAPTION_COLUMNS = ("text", "caption", "captions", "sentences", "sentence", "txt", "prompt")
IMAGE_COLUMNS = (
    "file_name", "image", "img", "jpg", "jpeg", "png", "webp", "image_path", "path", "filepath", "file", "filename",
)  # fmt: skip


def usual_name(names: Collection[str], usual: Collection[str]) -> str | None:
    """The first of the usual names that is among `names`; else the first that is in another case, such as `Image`."""
    return _usual_name(tuple(names), tuple(usual))


@lru_cache  # the rows of a list have the same few names
def _usual_name(names: tuple[str, ...], usual: tuple[str, ...]) -> str | None:
    for known in ({name: name for name in names}, {name.lower(): name for name in names}):
        if found := next((known[name] for name in usual if name in known), None):
            return found
    return None


def cell_captions(text: str) -> list[str]:
    """The captions in a cell of a table: the text, or the texts of a list, as JSON, Python or NumPy writes it."""
    if not (text.startswith(('["', "['")) and text.endswith("]")):
        return [text]
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
    with contextlib.suppress(ValueError, SyntaxError, tokenize.TokenError):
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        strings = [token.string for token in tokens if token.type == tokenize.STRING]
        rest = "".join(token.string for token in tokens if token.type != tokenize.STRING)
        if strings and re.fullmatch(r"\[,*\]", rest):  # NumPy writes no commas, and Python would join such strings
            return [ast.literal_eval(string) for string in strings]
    return [text]


def decode_image(data: bytes, id: str, where: object, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file, upright, to what `to_rgb` reads: L, LA, RGB, RGBA, CMYK or LAB, with its ICC profile.

    Of several frames, the first. `where` names the file in messages. An image of more than `max_pixels` is not decoded.
    """
    try:
        # Pillow warns of odd metadata and of large sizes, which is noise for a data set.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=image_formats()) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width} x {image.height} pixels; at most {max_pixels:,} are read")
            return to_channels(_upright(image))
    except Exception as error:  # Pillow raises almost any type for broken files
        # Pillow's message for unknown formats contains a memory address, so it would differ between runs.
        is_unknown = isinstance(error, UnidentifiedImageError)
        unknown = "not an image format, or not a kind of pixels, that Pillow can read; convert it to an 8-bit PNG"
        reason = unknown if is_unknown else " ".join(str(error).split())
        raise PairError(
            Problem(id, "broken image", f"{where}: the image of {id} cannot be decoded ({reason})")
        ) from None


def _upright(image: ImageFile.ImageFile) -> Image.Image:
    """The image turned upright, with the levels that the file means: Pillow leaves some of them as they are stored.

    Raises ValueError for those that Pillow reads wrongly.
    """
    white, is_inverted = 2**16 - 1, False
    if isinstance(image, PngImagePlugin.PngImageFile) and "transparency" in image.info:
        raw = image.tile[0][3]  # such as L;4: 4 bits of grey
        if raw in ("L;2", "L;4"):
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}[raw]
        elif raw == "RGB;16B":
            raise ValueError("it has 16 bits a channel and a transparent colour; convert it to RGBA")
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
        white = 2 ** max(tags.get(ExifTags.Base.BitsPerSample, (1,))) - 1
        if 2 in tags.get(ExifTags.Base.SampleFormat, ()):
            raise ValueError("its integers are signed, so its white is not known; convert it to PNG")
        has_alpha = not {1, 2}.isdisjoint(tags.get(TiffImagePlugin.EXTRASAMPLES, ()))
        if has_alpha and not image.has_transparency_data:
            raise ValueError("its transparency cannot be read; convert it to RGBA")
    ImageOps.exif_transpose(image, in_place=True)
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled it to 0..65535
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in DEEP_GREY and (is_inverted or white < 2**16 - 1):
        levels = np.asarray(image).astype(np.uint32) * (2**16 - 1) // white
        return _like(image, (2**16 - 1 - levels if is_inverted else levels).astype(np.uint16))
    if image.mode == "F" and is_inverted:
        return _like(image, 1 - np.asarray(image))
    return image


def _like(image: Image.Image, levels: np.ndarray) -> Image.Image:
    made = Image.fromarray(levels)
    made.info = dict(image.info)
    return made


def decode_text(data: bytes, id: str, where: object) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PairError(Problem(id, "not UTF-8", f"{where}: is not UTF-8 text ({error.reason})")) from None


def decode_object(text: str, id: str, where: object) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PairError(Problem(id, "broken JSON", f"{where}: is not valid JSON ({error})")) from None
    if not isinstance(content, dict):
        raise PairError(Problem(id, "broken JSON", f"{where}: must be a JSON object, but is {a_type(content)}"))
    return content


def caption_values(row: Mapping[str, Any], keys: Collection[str], id: str, where: object) -> list[str]:
    """The captions under the first of `keys` that is present and not null: one string, or a list of strings."""
    key = usual_name([name for name in row if row[name] is not None], keys)
    value = None if key is None else row[key]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(caption, str) for caption in values):
        found = ", ".join(map(str, row)) or "nothing"
        message = f"{where}: needs {' or '.join(keys)} with a string or a list of strings; it has {found}"
        raise PairError(Problem(id, "no caption", message))
    return values


def clean_captions(captions: Iterable[str], id: str, where: object) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """-> (stripped captions, problems). Empty captions are dropped. Raises PairError if none remains."""
    given = list(captions)
    for caption in given:
        try:
            caption.encode()
        except UnicodeEncodeError:  # JSON can contain half a surrogate pair
            message = f"{where}: a caption of {id} is not Unicode text: {caption!r}"
            raise PairError(Problem(id, "not UTF-8", message)) from None
    kept = tuple(caption.strip() for caption in given if caption.strip())
    if not kept:
        what = "has only empty captions" if given else "has no caption"
        raise PairError(Problem(id, "no caption", f"{where}: {id} {what}"))
    empty = len(given) - len(kept)
    if not empty:
        return kept, ()
    message = f"{where}: {empty} of {len(given)} captions of {id} are empty and were dropped"
    return kept, (Problem(id, "empty caption", message, left_out=False),)
