"""The images that an evaluation measures or compares with: of a folder, a source or a feature store.

`uvit.evaluate.generate` has the images of a model. All are read in ranges, so that memory does not grow with their
number, and in a fixed order, whoever reads them.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from uvit.config.evaluate import EvaluateConfig
from uvit.errors import UserError
from uvit.evaluate.statistics_file import is_statistics
from uvit.images import to_pixels, to_rgb
from uvit.progress import Progress
from uvit.sample.files import SHEET
from uvit.sources.coco import has_captions
from uvit.sources.combine import SplitSource
from uvit.sources.decode import decode_image
from uvit.sources.kinds import METADATA
from uvit.sources.names import SPLITS, is_image, list_files, say_not_read, suffix_of
from uvit.sources.open import open_source, require_random_access
from uvit.sources.types import PairError, Problem, RandomAccessSource, digest_of
from uvit.store.reader import FeatureStore, open_features
from uvit.store.writer import INDEX_SHA256

CHUNK = 64  # images that are loaded, and whose features are stored, together
LOSSY_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "webp", "avif")


@dataclass(frozen=True)
class LoadedImages:
    """The images of a range, without those that cannot be read."""

    ids: list[str]  # B
    rows: list[int]  # B, their positions in the set
    pixels: np.ndarray  # (B, H, W, 3) uint8
    problems: tuple[Problem, ...] = ()


class ImageSet(Protocol):
    """Images in a fixed order. `description` is what the report says of them."""

    description: dict[str, Any]
    chunk: int  # images to load together

    @property
    def files_sha256(self) -> str | None:
        """With `description`, it tells images that were replaced. None: the description alone does."""

    def __len__(self) -> int: ...

    def load(self, start: int, stop: int, progress: Progress) -> LoadedImages:
        """Images start..stop - 1. Raises UserError if they differ in size."""


@dataclass(frozen=True)
class Preparation:
    """How images become pixels: squares, as in extraction, or (without a resolution) as they are."""

    resolution: int | None
    crop: str
    resize: str
    icc: str

    def apply(self, image: Image.Image, id: str) -> np.ndarray:
        """-> (H, W, 3) uint8."""
        if self.resolution is None:
            return np.asarray(to_rgb(image, self.icc))
        return to_pixels(image, self.resolution, self.crop, self.resize, id, self.icc).transpose(1, 2, 0)

    def __str__(self) -> str:
        profiles = "colour profiles " + ("converted to sRGB" if self.icc == "srgb" else "ignored")
        if self.resolution is None:
            return f"as they are, {profiles}"
        return f"crop {self.crop}, then {self.resize} to {self.resolution} pixels, {profiles}"


def open_images(config: EvaluateConfig, name: str, flag: str, resolution: int | None) -> ImageSet:
    """The images that --model or --reference names, each `resolution` pixels a side, or as they are (None).

    Raises UserError if there are none.
    """
    path = Path(name)
    if is_statistics(name):
        raise UserError(f"--{flag} {name}: holds statistics, and the images themselves are needed")
    if (path / "report.json").is_file() and (path / "images").is_dir():
        raise UserError(f"--{flag} {name}: is the folder of an evaluation; give its images, {path / 'images'}")
    preparation = Preparation(resolution, str(config.crop), str(config.resize), str(config.icc))
    if is_store(name, config.split or "train"):
        return _of_store(name, config.split or "train", flag, resolution)
    try:
        source = open_source(name, config.split or "train", config.image_folder, resolution or 256)
    except UserError as error:
        splits = [path / name for name in SPLITS] if config.split is not None else []
        lists = [folder / name for folder in (path, path / (config.split or "train")) for name in METADATA]
        # A mistake in a split, a list, captions of COCO or tars, which say what to take.
        is_mistake = any(each.exists() for each in (*splits, *lists)) or has_captions(path) or any(path.glob("*.tar"))
        if not is_mistake and path.is_dir() and (files := _image_files(path)):  # images alone
            return FolderImages(path, files, preparation)
        raise UserError(str(error).replace("--source", f"--{flag}")) from None
    return SourceImages(
        require_random_access(source, f"--{flag} {name}"),
        {"source": name, "split": config.split or "train"},
        preparation,
    )


def _image_files(folder: Path) -> list[str]:
    """The paths of a folder's images within it, in order. A contact sheet is none of them."""
    files = [name for name in list_files(folder).files if is_image(name)]
    sheets = [name for name in files if name.rpartition("/")[2] == SHEET]
    if len(sheets) < len(files):
        say_not_read(folder, sheets)
        files = [name for name in files if name not in sheets]
    return files


def is_store(name: str, split: str) -> bool:
    """Whether this is a feature store, or a folder of its splits with this one."""
    return any((folder / "manifest.json").is_file() for folder in (Path(name), Path(name) / split))


def open_stored_source(name: str, split: str, flag: str) -> tuple[RandomAccessSource, dict[str, Any]]:
    """(the source that a feature store was made from, what the store records of it)"""
    store = open_features(name, split, flag)
    if not isinstance(store, FeatureStore):
        raise UserError(f"--{flag} {name}: .npy features do not record their images; give the images")
    record = store.manifest["source"]
    try:
        source = open_source(
            record["source"],
            record["split"],
            record["image_folder"],
            record["resolution"],
            val_every=record["val_every"],
            image_column=record["image_column"],
            caption_column=record["caption_column"],
        )
    except (UserError, KeyError) as error:
        raise UserError(f"--{flag} {name}: the images that it was made from cannot be opened ({error})") from None
    images = require_random_access(source, f"--{flag} {name}")
    count, index = store.manifest["num_source_pairs"], record.get(INDEX_SHA256)
    if count not in (None, len(images)) or index not in (None, images.index_sha256()):
        raise UserError(
            f"--{flag} {name}: the source that it was made from has changed ({' '.join(record['source'])}); restore "
            "it, or give the images themselves"
        )
    return images, record


def _of_store(name: str, split: str, flag: str, resolution: int | None) -> "SourceImages":
    """The images that a feature store was made from, prepared as they were for it."""
    source, record = open_stored_source(name, split, flag)
    if resolution not in (None, record["resolution"]):
        raise UserError(
            f"--{flag} {name}: was made of images of {record['resolution']} pixels, and {resolution} are needed; give "
            "the images themselves"
        )
    return SourceImages(
        source,
        {"feature_store": name, "source": record["source"], "split": record["split"]},
        Preparation(record["resolution"], record["crop"], record["resize"], record.get("icc", "ignore")),
    )


def _size_and_time(file: Path) -> bytes:
    try:
        found = file.stat()
    except OSError:
        return f"{file}".encode(errors="surrogateescape")
    return f"{file}\0{found.st_size}\0{found.st_mtime_ns}".encode(errors="surrogateescape")


def image_id(source: RandomAccessSource, split: str, row: int) -> str:
    """What names an image of a source: the same in a source and in the parts that --val_every makes of it.

    Other sources have other ids, unless they have as many images.
    """
    if isinstance(source, SplitSource):
        return image_id(source.source, "train", source.rows.row(row))
    return f"{split} {row} of {len(source)}"


class FolderImages:
    """Image files of a folder, in the order of their paths within it, which are their ids."""

    chunk = CHUNK

    def __init__(self, folder: Path, files: Sequence[str], preparation: Preparation):
        self.folder, self.files, self.preparation = folder, files, preparation
        lossy = sum(suffix_of(file) in LOSSY_SUFFIXES for file in files)
        sizes = "".join(f"{file} {(folder / file).stat().st_size}\n" for file in files)
        self.description = {
            "folder": str(folder),
            "num_images": len(files),
            "names_and_sizes_sha256": hashlib.sha256(sizes.encode()).hexdigest(),  # other files are other images
            "preparation": str(preparation),
        }
        if lossy:
            self.description["lossy_files"] = lossy

    @functools.cached_property
    def files_sha256(self) -> str:
        return digest_of(_size_and_time(self.folder / file) for file in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, start: int, stop: int, progress: Progress) -> LoadedImages:
        return _load_each(range(start, stop), self._read, progress)

    def _read(self, row: int) -> tuple[str, np.ndarray]:
        id = self.files[row]
        file = self.folder / id
        try:
            data = file.read_bytes()
        except OSError as error:
            raise PairError(Problem(id, "broken image", f"{file}: cannot be read ({error.strerror})")) from None
        return id, self.preparation.apply(decode_image(data, id, file), id)


class SourceImages:
    """The images of captioned pairs, with ids of `image_id`."""

    chunk = CHUNK

    def __init__(
        self,
        source: RandomAccessSource,
        description: dict[str, Any],
        preparation: Preparation,
    ):
        self.source, self.preparation = source, preparation
        self.description = {**description, "num_images": len(source), "preparation": str(preparation)}

    @functools.cached_property
    def files_sha256(self) -> str:
        index = (self.source.index_sha256() or "").encode()
        return digest_of([index, *map(_size_and_time, self.source.image_files())])

    def __len__(self) -> int:
        return len(self.source)

    def load(self, start: int, stop: int, progress: Progress) -> LoadedImages:
        return _load_each(range(start, stop), self._read, progress)

    def _read(self, row: int) -> tuple[str, np.ndarray]:
        pair = self.source[row]
        return image_id(self.source, self.description["split"], row), self.preparation.apply(pair.image, pair.id)


def _load_each(numbers: range, read: Callable[[int], tuple[str, np.ndarray]], progress: Progress) -> LoadedImages:
    """`read` gives the id and the pixels of an image, or raises PairError."""
    ids, rows, pixels, problems = list[str](), list[int](), list[np.ndarray](), list[Problem]()
    for row in progress.over(numbers):
        try:
            id, array = read(row)
        except PairError as error:
            problems.append(error.problem)
            continue
        ids.append(id)
        rows.append(row)
        pixels.append(array)
    return LoadedImages(ids, rows, _stack(ids, pixels), tuple(problems))


def _stack(ids: list[str], pixels: list[np.ndarray]) -> np.ndarray:
    """Raises UserError, naming two of them, if images differ in size."""
    for id, array in zip(ids, pixels, strict=True):
        if array.shape != pixels[0].shape:
            (height, width), (first_height, first_width) = array.shape[:2], pixels[0].shape[:2]
            raise UserError(
                f"{id}: has {width} x {height} pixels, and {ids[0]} has {first_width} x {first_height}; "
                "give --resolution, to which all are cropped and scaled"
            )
    return np.stack(pixels) if pixels else np.empty((0, 1, 1, 3), np.uint8)
