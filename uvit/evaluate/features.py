"""Features of images on disk: computed once, in chunks that several processes share, resumed after any stop.

A chunk is a few images in a row (`ImageSet.chunk`), and has one file for each extractor:
FOLDER/EXTRACTOR/00000.safetensors. Whatever the number of processes, the chunks are the same, and so are the features.
When all are there, `load_features` joins them in FOLDER/EXTRACTOR-all, and maps the files: memory does not grow with
the number of images.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from uvit.errors import UserError
from uvit.evaluate.image_sets import ImageSet, LoadedImages
from uvit.evaluate.prompts import Prompt, prompts_sha256
from uvit.io import write_atomically
from uvit.progress import Progress


class PerImage(Protocol):
    """Anything that is computed for one image after the other."""

    @property
    def name(self) -> str:
        """Of its files."""

    @property
    def description(self) -> dict[str, Any]:
        """Equal ones mean equal features."""

    @property
    def uses_prompts(self) -> bool:
        """Whether the features depend on the prompts."""

    def extract(self, pixels: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """(B, H, W, 3) uint8 and the B prompts, if there are any -> arrays of B rows."""


@dataclass(frozen=True)
class FeatureSet:
    """What an extractor computed for the images that could be read."""

    arrays: dict[str, np.ndarray]  # (N, ...); those of `load_features` are mapped from the disk
    rows: np.ndarray  # (N,), the positions of the images in their set
    ids: list[str]  # N
    problems: list[dict[str, Any]]  # of the images that could not be read
    pixels_sha256: str  # over all pixels, in order

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self, name: str) -> Tensor:
        """An array as a tensor on the CPU, without a copy."""
        return torch.from_numpy(self.arrays[name])

    def half(self, which: int) -> "FeatureSet":
        """The images at even (0) or odd (1) positions of their set."""
        chosen = np.flatnonzero(self.rows % 2 == which)
        arrays = {name: np.asarray(array[chosen]) for name, array in self.arrays.items()}
        ids = [self.ids[i] for i in chosen]
        return FeatureSet(arrays, self.rows[chosen], ids, self.problems, self.pixels_sha256)


def extract_features(
    images: ImageSet,
    prompts: Sequence[Prompt],
    extractors: Sequence[PerImage],
    folder: Path,
    part: int,
    num_parts: int,
    progress: Progress,
) -> None:
    """Compute what is missing of this process's chunks: part, part + num_parts, ...

    The features of a chunk are computed in a second thread, while the next one is read or generated.
    """
    waiting: Future[None] | None = None
    with ThreadPoolExecutor(1, "features") as thread:
        for chunk in _chunks(images)[part::num_parts]:
            start, stop = chunk * images.chunk, min((chunk + 1) * images.chunk, len(images))
            its_prompts = prompts[start:stop]
            missing = [
                each for each in extractors if not _is_done(_chunk_file(folder, each, chunk), images, each, its_prompts)
            ]
            if missing:
                loaded = images.load(start, stop, progress)
                if waiting is not None:
                    waiting.result()
                waiting = thread.submit(_write_chunk, images, loaded, its_prompts, missing, folder, chunk)
            else:
                progress.skip(stop - start)
        if waiting is not None:
            waiting.result()


def num_own_images(images: ImageSet, part: int, num_parts: int) -> int:
    """How many images this process's chunks have."""
    return sum(min(images.chunk, len(images) - chunk * images.chunk) for chunk in _chunks(images)[part::num_parts])


def all_done(images: ImageSet, extractors: Sequence[PerImage], folder: Path) -> bool:
    """Whether every chunk is there, of this process and of the others."""
    return all(_chunk_file(folder, each, chunk).is_file() for each in extractors for chunk in _chunks(images))


def load_features(images: ImageSet, extractor: PerImage, folder: Path) -> FeatureSet:
    """The features of all images, joined. Raises UserError if none could be read."""
    chunks = [_chunk_file(folder, extractor, chunk) for chunk in _chunks(images)]
    headers = [_read_header(chunk) for chunk in chunks]
    ids = [id for header in headers for id in header["ids"]]
    problems = [problem for header in headers for problem in header["problems"]]
    if not ids:
        raise UserError(_none_readable(images, problems))
    digest = hashlib.sha256("".join(header["pixels_sha256"] for header in headers).encode()).hexdigest()
    rows = np.concatenate([np.array(header["rows"], np.int64) for header in headers])
    sizes = {tuple(header["size"]) for header in headers if header["rows"]}
    if len(sizes) > 1:
        (w1, h1), (w2, h2) = sorted(sizes)[:2]
        raise UserError(
            f"{_name(images)}: has images of {w1} x {h1} and of {w2} x {h2} pixels; give --resolution, to which all "
            "are cropped and scaled"
        )
    with_rows = [chunk for chunk, header in zip(chunks, headers, strict=True) if header["rows"]]
    return FeatureSet(_join(with_rows, len(rows), folder / f"{extractor.name}-all"), rows, ids, problems, digest)


def describe_images(images: ImageSet, features: FeatureSet) -> dict[str, Any]:
    """What a report and a file of statistics say of images: which, the hash of their pixels, and which are left out."""
    problems = {"problems": features.problems} if features.problems else {}
    return {**images.description, "pixels_sha256": features.pixels_sha256, **problems}


def features_in_memory(
    images: ImageSet, total: int, extractors: Sequence[PerImage], progress: Progress
) -> dict[str, FeatureSet]:
    """{extractor: the features of the first `total` images}, not on disk. Raises UserError if none can be read."""
    parts: dict[str, list[dict[str, np.ndarray]]] = {each.name: [] for each in extractors}
    rows, ids, problems = list[int](), list[str](), list[dict[str, Any]]()
    for start in range(0, total, images.chunk):
        loaded = images.load(start, min(start + images.chunk, total), progress)
        rows, ids = rows + loaded.rows, ids + loaded.ids
        problems += map(asdict, loaded.problems)
        for each in extractors if loaded.ids else ():
            parts[each.name].append(each.extract(loaded.pixels, []))
    if not ids:
        raise UserError(_none_readable(images, problems))
    return {
        name: FeatureSet(
            {key: np.concatenate([part[key] for part in its_parts]) for key in its_parts[0]},
            np.array(rows), ids, problems, "",
        )
        for name, its_parts in parts.items()
    }  # fmt: skip


def _none_readable(images: ImageSet, problems: Sequence[dict[str, Any]]) -> str:
    what = problems[0]["message"] if problems else "there are none"
    return f"{_name(images)}: none of the {len(images)} images can be read ({what})"


def _join(chunks: Sequence[Path], num_rows: int, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of all chunks, each as one .npy file that is mapped into memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(chunks[0], "np") as file:
        likes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    joined = {}
    for name, like in likes.items():
        path = folder / f"{name}.npy"
        with write_atomically(path, sync=False) as aside:
            array = np.lib.format.open_memmap(aside, "w+", like.dtype, (num_rows, *like.shape[1:]))
            row = 0
            for chunk in chunks:
                with safe_open(chunk, "np") as file:
                    values = file.get_tensor(name)
                array[row : row + len(values)] = values
                row += len(values)
            array.flush()
        joined[name] = np.load(path, mmap_mode="c")  # torch warns of read-only arrays
    return joined


def _write_chunk(
    images: ImageSet,
    loaded: LoadedImages,
    prompts: Sequence[Prompt],
    extractors: Sequence[PerImage],
    folder: Path,
    chunk: int,
) -> None:
    """`prompts`: those of the chunk, if there are any."""
    header = {
        "ids": loaded.ids,
        "rows": loaded.rows,
        "size": [loaded.pixels.shape[2], loaded.pixels.shape[1]],
        "pixels_sha256": hashlib.sha256(loaded.pixels.tobytes()).hexdigest(),
        "problems": [asdict(problem) for problem in loaded.problems],
    }
    its_prompts = [prompts[row - chunk * images.chunk] for row in loaded.rows] if prompts else []
    for extractor in extractors:
        arrays = extractor.extract(loaded.pixels, its_prompts) if loaded.ids else {}
        path = _chunk_file(folder, extractor, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, sync=False) as aside:
            save_file(
                {name: np.ascontiguousarray(array) for name, array in arrays.items()},
                aside,
                {"uvit": json.dumps({**header, **_made_of(images, extractor, prompts)})},
            )


def _chunks(images: ImageSet) -> range:
    return range(-(-len(images) // images.chunk))


def _chunk_file(folder: Path, extractor: PerImage, chunk: int) -> Path:
    return folder / extractor.name / f"{chunk:05d}.safetensors"


def _made_of(images: ImageSet, extractor: PerImage, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """What the features of a chunk depend on. `inputs` is not in reports: the times of equal files may differ."""
    inputs = {}
    if images.files_sha256 is not None:
        inputs["sizes_and_times_sha256"] = images.files_sha256
    if extractor.uses_prompts:
        inputs["prompts_sha256"] = prompts_sha256(prompts)
    return {"images": images.description, "extractor": dict(extractor.description), "inputs": inputs}


def _is_done(path: Path, images: ImageSet, extractor: PerImage, prompts: Sequence[Prompt]) -> bool:
    """Whether a chunk is there. Raises UserError if it was made of other images or prompts, or with other settings."""
    if not path.is_file():
        return False
    header = _read_header(path)
    if "inputs" not in header and _made_of(images, extractor, prompts)["inputs"]:
        raise UserError(
            f"{path}: was written by an earlier version, which did not record prompts and files; delete "
            f"{path.parent.parent} and run the same command again"
        )
    for what, own in _made_of(images, extractor, prompts).items():
        made_of = header.get(what, {})
        for key in sorted({*own, *made_of}):
            there, here = made_of.get(key, "nothing"), json.loads(json.dumps(own.get(key, "nothing")))
            if there != here:
                raise UserError(
                    f"{path}: was made with other settings ({key}: {there} there, {here} here); run the same command "
                    f"to resume, choose another --output_dir, or delete {path.parent.parent}"
                )
    return True


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "np") as file:
            header = json.loads(file.metadata()["uvit"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run the same command again") from None
    assert isinstance(header, dict)
    return header


def _name(images: ImageSet) -> str:
    return next(str(images.description[key]) for key in ("folder", "source", "feature_store", "model", "images")
                if key in images.description)  # fmt: skip
