"""Decode the bytes and fields of any source to images and captions. Raises PairError if that is impossible."""

import io
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from uvit.images import on_white
from uvit.sources.types import PairError, Problem

CAPTION_COLUMNS = ("text", "caption", "captions", "sentences", "sentence", "txt", "prompt")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "file_name", "image_path", "path", "filepath", "file")


def decode_image(data: bytes, id: str, where: object) -> Image.Image:
    """Decode an image file to upright RGB, on white where it is transparent. `where` names the file in messages."""
    try:
        # Pillow warns of odd metadata and of large sizes, which is noise for a data set.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would clip it at 255 instead of scaling it
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return on_white(upright)
    except Exception as error:  # Pillow raises almost any type for broken files
        # Pillow's message for unknown formats contains a memory address, so it would differ between runs.
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image format that Pillow can read" if is_unknown else " ".join(str(error).split())
        raise PairError(
            Problem(id, "broken image", f"{where}: the image of {id} cannot be decoded ({reason})")
        ) from None


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
        raise PairError(
            Problem(id, "broken JSON", f"{where}: must be a JSON object, but is a {type(content).__name__}")
        )
    return content


def caption_values(row: Mapping[str, Any], keys: Iterable[str], id: str, where: object) -> list[str]:
    """The captions under the first of `keys` that is present and not null: one string, or a list of strings."""
    value = next((row[key] for key in keys if row.get(key) is not None), None)
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
