"""Images as files, arrays and tensors, and contact sheets."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from uvit.io import write_atomically

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
SHEET_COLOUR = (232, 232, 236)  # the background of sheets; white images stand out from it


def to_pixels(
    image: Image.Image, resolution: int, crop: str = "center", resize: str = "lanczos", key: str = ""
) -> np.ndarray:
    """Any image as a square: -> (3, R, R) uint8. Transparent parts become white.

    Args:
        crop: `center` takes the middle square; `random` takes a square that depends on `key` alone; `pad` adds white
            bars; `stretch` changes the proportions.
        resize: the filter, one of FILTERS.
    """
    if image.mode != "RGB":
        image = on_white(image)
    side, square = min(image.size), (resolution, resolution)
    if crop == "pad":
        scale = resolution / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        inner = image if image.size == size else image.resize(size, FILTERS[resize])
        image = Image.new("RGB", square, "white")
        image.paste(inner, ((resolution - size[0]) // 2, (resolution - size[1]) // 2))
    elif crop == "stretch":
        image = image if image.size == square else image.resize(square, FILTERS[resize])
    else:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if crop == "random":
            number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
            left, top = number % (image.width - side + 1), number % (image.height - side + 1)  # one of them is 0
        box = (left, top, left + side, top + side)
        image = image.crop(box) if side == resolution else image.resize(square, FILTERS[resize], box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; transparent parts become white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_unit(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape."""
    return torch.as_tensor(pixels).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, rounded, same shape."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B images."""
    return [Image.fromarray(array) for array in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


def contact_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    cell: int = 128,
    headings: Sequence[str] | None = None,
) -> Image.Image:
    """Images in rows, each scaled to at most `cell` pixels, with its label below in up to four lines.

    `headings` are the titles of the columns.
    """
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(max(10, cell // 11))
    wrapped = [_wrap(label, font, cell) for label in labels] if labels else []
    line_height = int(font.size * 1.25) if isinstance(font, ImageFont.FreeTypeFont) else 12
    scaled = [_fit(image, cell) for image in images]
    height = max(image.height for image in scaled)
    text_height = max((len(lines) for lines in wrapped), default=0) * line_height
    gap = max(2, cell // 32)
    above = [_wrap(heading, font, cell) for heading in headings or ()]
    top = gap + max((len(lines) for lines in above), default=0) * line_height
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, top + rows * (height + text_height + gap)), SHEET_COLOUR)
    draw = ImageDraw.Draw(sheet)
    for i, lines in enumerate(above):
        for k, line in enumerate(lines):
            draw.text((gap + i * (cell + gap), gap + k * line_height), line, fill="black", font=font)
    for i, image in enumerate(scaled):
        x, y = gap + (i % columns) * (cell + gap), top + (i // columns) * (height + text_height + gap)
        sheet.paste(image, (x, y))
        for k, line in enumerate(wrapped[i] if labels else []):
            draw.text((x, y + height + k * line_height), line, fill="black", font=font)
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """RGB, scaled so that the longer side has `cell` pixels. Pixels of small images stay visible."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    sharp = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, sharp)


def save_png(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with `text` in its metadata."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, sync=False) as aside:
        image.save(aside, format="PNG", pnginfo=info)


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 4) -> list[str]:
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:max_lines]
