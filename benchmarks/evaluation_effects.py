"""What moves a Frechet distance although the pictures stay the same: resizing, rounding, JPEG, the number of images.

    python benchmarks/evaluation_effects.py FOLDER [--resolution 128] [--most 400] [--choices 3]
        [--inception_weights FILE | --feature_extractor FOLDER_OR_HUB_ID]

Every image is cut to 4:3, prepared in one way (the middle square, Lanczos, PNG), and then in another. Each line has the
distance between the two sets, which show the same pictures; the distance is 0 where the way makes no difference. The
last lines have the distance between two halves of the images, prepared alike: different pictures of the same kind.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from uvit.evaluate.extractors import Extractor, folder_extractor, inception_extractor
from uvit.evaluate.frechet import frechet_distance, statistics_of
from uvit.images import FILTERS, to_pixels
from uvit.sources.decode import decode_image
from uvit.sources.names import is_image, list_files

Way = Callable[[Image.Image], np.ndarray]  # -> (R, R, 3) uint8


def ways(resolution: int) -> dict[str, Way]:
    def prepared(crop: str = "center", resize: str = "lanczos") -> Way:
        return lambda image: to_pixels(image, resolution, crop, resize).transpose(1, 2, 0)

    def square(image: Image.Image) -> tuple[int, int, int, int]:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return left, top, left + side, top + side

    def box(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((resolution, resolution), FILTERS["lanczos"], box=square(image)))

    def truncated(image: Image.Image) -> np.ndarray:
        planes = [plane.convert("F") for plane in image.crop(square(image)).split()]
        resized = [np.asarray(plane.resize((resolution, resolution), FILTERS["lanczos"])) for plane in planes]
        return np.stack(resized, axis=2).clip(0, 255).astype(np.uint8)  # without + 0.5

    def nearest(image: Image.Image) -> np.ndarray:
        return np.asarray(image.crop(square(image)).resize((resolution, resolution), Image.Resampling.NEAREST))

    def jpeg(quality: int) -> Way:
        def compressed(image: Image.Image) -> np.ndarray:
            file = io.BytesIO()
            Image.fromarray(prepared()(image)).save(file, "JPEG", quality=quality)
            return np.asarray(Image.open(file))

        return compressed

    return {
        "resized within `box=`, not cropped first": box,
        "bicubic instead of Lanczos": prepared(resize="bicubic"),
        "bilinear instead of Lanczos": prepared(resize="bilinear"),
        "nearest instead of Lanczos": nearest,
        "the whole image stretched, not cropped": prepared(crop="stretch"),
        "cut off to 8 bits, not rounded": truncated,
        "JPEG, quality 95": jpeg(95),
        "JPEG, quality 75": jpeg(75),
    }


def open_folder(folder: Path, most: int) -> list[Image.Image]:
    """The first images, cut to 4:3."""
    names = [name for name in list_files(folder).files if is_image(name)][:most]
    images = [decode_image((folder / name).read_bytes(), name, folder / name).convert("RGB") for name in names]
    rows = [round(min(image.height, image.width * 0.75)) for image in images]
    return [
        image.crop((0, (image.height - keep) // 2, image.width, (image.height + keep) // 2))
        for image, keep in zip(images, rows, strict=True)
    ]


def features(extractor: Extractor, images: list[Image.Image], way: Way) -> torch.Tensor:
    parts = [images[start : start + 16] for start in range(0, len(images), 16)]
    return torch.cat([extractor([way(image) for image in part]) for part in parts])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return frechet_distance(statistics_of(one), statistics_of(other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--most", type=int, default=400)
    parser.add_argument("--choices", type=int, default=3, help="of the images of each side, for the last table")
    parser.add_argument("--inception_weights")
    parser.add_argument("--feature_extractor")
    given = parser.parse_args()
    if given.feature_extractor:
        extractors = {"": folder_extractor(given.feature_extractor)}
    else:
        conventions = ("pytorch-fid", "torch-fidelity", "clean-fid")
        extractors = {name: inception_extractor(given.inception_weights, name) for name in conventions}
    images = open_folder(given.folder, given.most)
    all_ways = ways(given.resolution)
    usual = all_ways["nothing"] = lambda image: to_pixels(image, given.resolution).transpose(1, 2, 0)
    first, *others = extractors.items()
    base = features(first[1], images, usual)
    print(f"{len(images)} images, {given.resolution} pixels, {first[1].name}, called {first[1].distance}\n")
    print("| what differs | distance of the same pictures |\n|---|---:|")
    for name, way in all_ways.items():
        print(f"| {name} | {distance(features(first[1], images, way), base):.4g} |", flush=True)
    for name, extractor in others:
        print(
            f"| input of {name}, not {first[0]} | {distance(features(extractor, images, usual), base):.4g} |",
            flush=True,
        )
    print(
        "\n| images on either side | distance of different pictures: mean | least | greatest |\n|---:|---:|---:|---:|"
    )
    size = len(images) // 2
    while size >= 16:
        found = []
        for seed in range(given.choices):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            found.append(distance(base[order[:size]], base[order[size : 2 * size]]))
        print(f"| {size} | {np.mean(found):.4g} | {min(found):.4g} | {max(found):.4g} |", flush=True)
        size //= 2


if __name__ == "__main__":
    main()
