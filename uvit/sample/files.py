"""The files of `uvit sample`: PNGs with metadata, latents, the contact sheet; and which of them exist already."""

import dataclasses
import fcntl
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from uvit import __version__
from uvit.config.sample import SampleConfig
from uvit.errors import UserError, differences
from uvit.images import contact_sheet, save_png
from uvit.io import takes_files, write_atomically
from uvit.sample.jobs import ImageJob, Variant

SHEET = "contact_sheet.png"
MAX_SHEET_IMAGES = 400
MAX_SHEET_COLUMNS = 20  # unless --columns says otherwise
# Flags that do not change an image, or that the metadata holds under a name of its own.
UNRECORDED_FLAGS = {
    "pipeline", "guidance_scale", "compare_with", "prompts", "prompts_file", "seed", "num_images_per_prompt",
    "output_dir", "batch_size", "device", "enable_vae_slicing", "enable_vae_tiling", "enable_model_cpu_offload",
    "shard", "skip_existing", "save_latents", "grid", "columns", "disable_tqdm", "speed",
    "fit_schedule", "compile",
}  # fmt: skip

# A path can be written in many ways, so paths are not compared; the SHA-256 of each file is.
UNCOMPARED_FIELDS = {"software", "pipeline", "init_image", "mask"}
WEIGHTS = {"unet_sha256", "pipeline_sha256"}


def metadata(
    config: SampleConfig, variant: Variant, weights: Mapping[str, str], uploads: Mapping[str, bytes] | None = None
) -> dict[str, str]:
    """The settings of an image, by flag name. The caller adds prompt and seed.

    Args:
        weights: unet_sha256, and pipeline_sha256 of what else in the pipeline makes the image.
        uploads: the content of --init_image and --mask where these are no files.
    """
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNRECORDED_FLAGS}
    values = {
        "software": f"uvit {__version__}",
        "pipeline": variant.pipeline,
        **weights,
        "guidance_scale": variant.guidance_scale,
        **flags,
        "guidance_interval": "{:g} {:g}".format(*config.guidance_interval),
    }
    for name in ("init_image", "mask"):
        if flags[name] is not None:
            content = Path(flags[name]).read_bytes() if uploads is None else uploads[name]
            values[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
    return {name: str(value) for name, value in values.items() if value is not None}


def check_writable(folder: Path, flag: str) -> None:
    """Raises UserError if the folder cannot be written, before the work begins."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{flag}: {existing} is not a folder; choose another")
    if not takes_files(existing):
        raise UserError(f"{flag}: {existing} is not writable; choose another, or change its permissions")


def numbered(folder: Path) -> dict[int, Path]:
    """{number: path} of the images in a folder."""
    matches = [(re.match(r"(\d{5,})-", path.name), path) for path in folder.glob("*.png")]
    return {int(match[1]): path for match, path in matches if match}


def next_number(folder: Path) -> int:
    """One more than the highest number in the folder, so that no image is overwritten."""
    return max(numbered(folder), default=-1) + 1


def is_generated(path: Path, text: Mapping[str, str], latents: str | None) -> bool:
    """Whether the image and its latents exist. Raises UserError if the image was made with other settings.

    Of the fields in WEIGHTS, those that both sides know are compared: `text` may be from before the model is loaded.
    """
    try:
        with Image.open(path) as image:
            image.load()
            found = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run the same command again") from None
    unknown = {name for name in WEIGHTS if name not in found or name not in text}
    before, now = (
        {name: value for name, value in each.items() if name not in UNCOMPARED_FIELDS | unknown}
        for each in (found, text)
    )
    if changed := differences(before, now):
        raise UserError(
            f"{path}: was made with other settings; --skip_existing resumes the same command only; choose another "
            "--output_dir",
            list(changed.values()),
        )
    return latents is None or path.with_suffix(f".{latents}").is_file()


def save_image(
    path: Path, image: Image.Image, latents: Tensor, text: Mapping[str, str], latents_as: str | None
) -> None:
    """Write the latents (C, h, w), if asked for, and then the PNG. So an image with its PNG is complete."""
    if latents_as is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.with_suffix(f".{latents_as}")
        with write_atomically(target, sync=False) as aside:
            if latents_as == "npy":
                with aside.open("wb") as file:
                    np.save(file, latents.cpu().numpy())
            else:
                save_file({"latents": latents.cpu().contiguous()}, aside)
    save_png(image, path, text)


def read_image(path: Path) -> Image.Image:
    """A generated image, RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run the same command again") from None


def save_sheet(
    config: SampleConfig, variants: list[Variant], jobs: list[ImageJob], settings: Mapping[str, str]
) -> Path | None:
    """Read the images back and write them as one sheet, variants side by side. None if some are still missing."""
    shown = jobs[: max(1, MAX_SHEET_IMAGES // len(variants))]
    paths = [variant.folder / job.file_name for job in shown for variant in variants]
    if not all(path.is_file() for path in paths):
        return None
    sheet_path = Path(config.output_dir) / SHEET
    columns = config.columns
    if columns is None and 1 < config.num_images_per_prompt <= MAX_SHEET_COLUMNS:
        columns = config.num_images_per_prompt
    labels = [job.prompt for job in shown]
    headings = None
    if len(variants) > 1:  # one or more jobs per row, each with all its variants
        across = min(max(1, (config.columns or 1) // len(variants)), len(shown))
        columns, headings = across * len(variants), [variant.name for variant in variants] * across
        labels = [label if first else "" for label in labels for first in [True, *[False] * (len(variants) - 1)]]
    sheet = contact_sheet(list(map(read_image, paths)), labels, columns, headings=headings)
    folder = os.open(sheet_path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two processes may finish at the same time
        save_png(sheet, sheet_path, settings)
    finally:
        os.close(folder)
    return sheet_path
