"""Images as files, arrays and tensors, and contact sheets."""

import functools
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin
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
    image: Image.Image,
    resolution: int,
    crop: str = "center",
    resize: str = "lanczos",
    key: str = "",
    icc: str = "srgb",
) -> np.ndarray:
    """Any image as a square: -> (3, R, R) uint8. Transparent parts become white.

    Args:
        crop: `center` takes the middle square; `random` takes a square that depends on `key` alone; `pad` adds white
            bars; `stretch` changes the proportions.
        resize: the filter, one of FILTERS. It sees the square alone, not the pixels beside it.
        icc: what to do with colour profiles, as for `to_rgb`.
    """
    image = to_rgb(image, icc)
    side, square = min(image.size), (resolution, resolution)
    if crop == "pad":
        scale = resolution / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        inner = _resized(image, size, resize)
        image = Image.new("RGB", square, "white")
        image.paste(inner, ((resolution - size[0]) // 2, (resolution - size[1]) // 2))
    elif crop == "random":
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        left, top = number % (image.width - side + 1), number % (image.height - side + 1)  # one of them is 0
        image = _resized(image.crop((left, top, left + side, top + side)), square, resize)
    elif crop == "center":
        image = center_crop(image, square, resize)
    else:
        image = _resized(image, square, resize)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def center_crop(image: Image.Image, size: tuple[int, int], resize: str = "lanczos") -> Image.Image:
    """Crop the largest centered part with the proportions of `size` (width, height), then scale it to `size`."""
    width = min(image.width, max(1, round(image.height * size[0] / size[1])))
    height = min(image.height, max(1, round(image.width * size[1] / size[0])))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return _resized(image.crop((left, top, left + width, top + height)), size, resize)


def _resized(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    return image if image.size == size else image.resize(size, FILTERS[resize])


# Colours

DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")  # 0 is black, 65535 is white


def to_rgb(image: Image.Image, icc: str = "srgb") -> Image.Image:
    """Any image -> RGB, 8 bits; transparent parts become white.

    Args:
        icc: `srgb` converts the colours from the image's ICC profile to sRGB; `ignore` takes the numbers as they are.
            A profile that is damaged, or that is for other channels than the image has, counts as absent.

    Raises ValueError for pixels whose meaning is not known.
    """
    if image.mode == "RGB" and not image.info:
        return image
    image = to_channels(image)
    colours = image
    alpha = None
    if image.mode in ("LA", "RGBA"):
        colours, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
    profile = image.info.get("icc_profile") if icc == "srgb" else None
    transform: ImageCms.ImageCmsTransform | None = None
    if colours.mode == "LAB":
        transform = _lab_to_srgb()
    elif isinstance(profile, bytes) and profile:
        transform = _profile_to_srgb(profile, colours.mode)
    if transform is not None:
        rgb = ImageCms.applyTransform(colours, transform)
        assert rgb is not None  # it is None in place only
    else:
        rgb = colours.convert("RGB")
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info = {}
    return rgb


def to_channels(image: Image.Image) -> Image.Image:
    """Any image -> L, LA, RGB, RGBA, CMYK or LAB, 8 bits a channel. Its colours are those of its ICC profile.

    16-bit grey is scaled from 0..65535, floats from 0..1. Raises ValueError for pixels whose meaning is not known.
    """
    clear = image.has_transparency_data
    if image.mode in DEEP_GREY:
        levels = np.asarray(image).astype(np.uint16)
        grey = (levels >> 8).astype(np.uint8)
        key = image.info.get("transparency")  # the level that is transparent
        return _grey(image, grey, None if key is None else (levels != key) * np.uint8(255))
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"its floats are {values.min():g} to {values.max():g}, and only those from 0 (black) to 1 (white) are"
                " read; convert it to 8 or 16 bits"
            )
        return _grey(image, np.rint(values * 255).astype(np.uint8), None)
    if image.mode == "I":
        raise ValueError("its integers have 32 bits, so its white is not known; convert it to 8 or 16 bits")
    if image.mode in ("1", "L", "LA", "La"):
        mode = "LA" if clear else "L"
    elif image.mode in ("CMYK", "LAB"):
        mode = image.mode
    else:
        mode = "RGBA" if clear else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _grey(image: Image.Image, grey: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """The image of these levels (H, W) uint8, with the profile of `image`."""
    made = Image.fromarray(grey)
    if alpha is not None:
        made.putalpha(Image.fromarray(alpha))
    made.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return made


@functools.lru_cache(maxsize=32)
def _profile_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of L, RGB or CMYK to sRGB. None: the profile is sRGB, is damaged, or is for other channels."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = _transform(opened, mode)
        if mode == "CMYK":
            return transform
        # sRGB exists in many versions. Converting it to itself would only round.
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(16, -1, 3)
        colours = Image.fromarray(probe if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        converted = ImageCms.applyTransform(colours, transform)
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    assert converted is not None
    difference = np.asarray(converted).astype(int) - np.asarray(colours.convert("RGB"))
    return None if np.abs(difference).max() <= 1 else transform


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


def _transform(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode != "RGB":  # the fast way is within one level for RGB alone; linear grey would be 10 off
        flags |= ImageCms.Flags.NOOPTIMIZE
    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=flags,
    )


# Arrays, tensors and files


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
    columns = min(columns or max(1, math.ceil(math.sqrt(len(images)))), len(images))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, sync=False) as aside:
        write_png(image, aside, text)


def write_png(image: Image.Image, target: Path | IO[bytes], text: Mapping[str, str] | None = None) -> None:
    """Write a PNG to a path or an open file, with `text` in its metadata."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    image.save(target, format="PNG", pnginfo=info)


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 4) -> list[str]:
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:max_lines]
