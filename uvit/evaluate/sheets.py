"""Contact sheets of an evaluation: its first images, those of each category, and the real images nearest to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from uvit.evaluate.attributes import attribute_sheet
from uvit.evaluate.features import FeatureSet
from uvit.evaluate.generate import folder_name
from uvit.evaluate.image_sets import ImageSet
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.retrieval import nearest_images
from uvit.images import contact_sheet, save_png
from uvit.progress import Progress

SHEET_IMAGES = 64
MAX_NEIGHBOUR_ROWS = 24


def write_sheets(folder: Path, images: ImageSet, prompts: Sequence[Prompt]) -> None:
    """The first images; and for prompts with categories, a sheet for each."""
    if prompts and prompts[0].scene is not None:
        shown = _load(images, range(min(len(images), SHEET_IMAGES)))
        save_png(attribute_sheet(prompts[: len(shown)], shown), folder / "contact_sheet.png")
        return
    _save_sheet(images, list(range(len(images))), prompts, folder / "contact_sheet.png")
    categories = list(dict.fromkeys(prompt.category for prompt in prompts if prompt.category))
    for number, category in enumerate(categories):  # numbered: names of folders may be equal, or empty
        rows = [row for row, prompt in enumerate(prompts) if prompt.category == category]
        _save_sheet(images, rows, prompts, folder / "sheets" / f"{number:02d}-{folder_name(category)[:60]}.png")


def write_neighbours(
    folder: Path,
    images: ImageSet,
    features: FeatureSet,
    reference: ImageSet,
    real: FeatureSet,
    centered: bool = False,
) -> None:
    """The first images, each with the real ones nearest to it: copies show what was memorised."""
    mine = features.tensor("features")[:MAX_NEIGHBOUR_ROWS]
    nearest, cosines = nearest_images(mine, real.tensor("features"), centered)
    shown, labels = list[Image.Image](), list[str]()
    for row, its_nearest, its_cosines in zip(features.rows, nearest.tolist(), cosines.tolist(), strict=False):
        shown += _load(images, [int(row)]) + _load(reference, [int(real.rows[i]) for i in its_nearest])
        labels += ["generated", *(f"cosine {cosine:.3f}" for cosine in its_cosines)]
    save_png(contact_sheet(shown, labels, columns=1 + nearest.shape[1]), folder / "neighbours.png")


def _save_sheet(images: ImageSet, rows: Sequence[int], prompts: Sequence[Prompt], path: Path) -> None:
    rows = rows[:SHEET_IMAGES]
    labels = [prompts[row].text for row in rows] if prompts else None
    if shown := _load(images, rows):
        save_png(contact_sheet(shown, labels), path)


def _load(images: ImageSet, rows: Sequence[int]) -> list[Image.Image]:
    """Images by their positions; those that cannot be read are grey."""
    found = []
    with Progress("sheet", len(rows), "image", bar=False, lines=False) as progress:
        for row in rows:
            loaded = images.load(row, row + 1, progress)
            found.append(
                Image.fromarray(np.asarray(loaded.pixels[0])) if loaded.ids else Image.new("RGB", (64, 64), "grey")
            )
    return found
