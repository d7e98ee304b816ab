"""Open what `--source` names: recognise each input, open it, concatenate the inputs, and select the split.

Opening a source reads its index. Images are decoded when a pair is requested. All sources are picklable and keep no
files open, so worker processes can share them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Literal, cast

from uvit.errors import UserError
from uvit.sources import huggingface, tars
from uvit.sources.coco import find_captions, open_coco
from uvit.sources.combine import ConcatSource, ConcatStream, SplitRule, SplitSource, SplitStream
from uvit.sources.files import LIST_SUFFIXES, has_captioned_images, lists_paths, open_folder, open_list
from uvit.sources.shapes import ShapesSource
from uvit.sources.types import RandomAccessSource, Source

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SOURCE_KINDS = (
    "shapes, shapes:two, .tar files, a COCO captions .json, a .jsonl, .csv, .tsv or .parquet list, hf:HUB_ID, or a "
    "folder of one of these or of images with .txt files"
)

SourceKind = Literal["shapes", "tars", "coco", "list", "images", "dataset"]


@dataclass(frozen=True)
class _Input:
    """One input of --source, and what it was recognised as."""

    name: str  # as it was given
    kind: SourceKind
    files: tuple[str, ...]  # what to read
    folder: Path | None = None  # its own image folder, if it has one; --image_folder overrides it
    parts: str | None = None  # its splits, in words; None: it has none, and all of it is `train`


def open_source(
    source: Sequence[str] | str,
    split: str = "train",
    image_folder: Sequence[str] = (),
    resolution: int = 256,
    *,
    val_every: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Source:
    """Recognise each input of `source`, read its index, and concatenate the inputs.

    Args:
        split: `train` or `heldout` for shapes; the split of that name for folders and datasets.
        image_folder: the images of COCO captions files and of lists: one folder for all, or one for each.
        resolution: at which shapes are rendered; other images keep their size.
        val_every: for inputs without splits: every N-th pair is `val`, and the others are `train`.
        image_column, caption_column: for lists and Hugging Face datasets, if the columns have unusual names.
        streaming: read Hugging Face datasets without downloading them first.

    Raises UserError, which names the file and what was found in it, if there is nothing to read.
    """
    names = [name for place in ([source] if isinstance(source, str) else source) for name in tars.expand(place)]
    if not names:
        raise UserError(f"--source: is empty; give {SOURCE_KINDS}")
    try:
        places = [_recognise(name, split, val_every is not None, image_column, caption_column) for name in names]
        _check_parts(places, split, val_every)
        _check_flags(places, image_column, caption_column, streaming)
        places = _with_folders(places, image_folder)
        # A dataset has splits of its own; --val_every divides its `train`.
        open_dataset = partial(
            huggingface.open_dataset,
            split=split if val_every is None else "train",
            image_column=image_column,
            caption_column=caption_column,
            streaming=streaming,
        )
        opened: list[Source] = []
        for (kind, folder), group in groupby(places, key=lambda place: (place.kind, place.folder)):
            files = [file for place in group for file in place.files]
            if kind == "shapes":
                opened += [_shapes(name, split, resolution) for name in files]
            elif kind == "tars":
                opened.append(tars.open_tars(files))
            elif kind == "coco":  # files with the same folder describe the same images
                opened.append(open_coco([Path(file) for file in files], cast(Path, folder)))
            elif kind == "list":
                opened += [open_list(Path(file), folder, image_column, caption_column) for file in files]
            elif kind == "images":
                opened += [open_folder(Path(file)) for file in files]
            else:
                opened += [open_dataset(file) for file in files]
    except OSError as error:
        raise UserError(f"--source {error.filename or names[0]}: cannot be read ({error.strerror})") from None
    whole = _concatenate(opened)
    if val_every is None:
        return whole
    rows = SplitRule(val_every, split)
    if not isinstance(whole, RandomAccessSource):
        return SplitStream(whole, rows)
    part = SplitSource(whole, rows)
    if not len(part):
        raise UserError(
            f"--val_every {val_every}: leaves --split {split} empty, of {len(whole)} pairs; give a smaller number"
        )
    return part


def require_random_access(source: Source, flag: str) -> RandomAccessSource:
    """The source itself. Raises UserError, which begins with `flag`, if it has no random access."""
    if isinstance(source, RandomAccessSource):
        return source
    raise UserError(
        f"{flag}: can only be read from beginning to end, but this command needs random access; download it first"
    )


def _concatenate(opened: list[Source]) -> Source:
    if len(opened) == 1:
        return opened[0]
    with_random_access = [source for source in opened if isinstance(source, RandomAccessSource)]
    return ConcatSource(with_random_access) if len(with_random_access) == len(opened) else ConcatStream(opened)


def _shapes(name: str, split: str, resolution: int) -> Source:
    if split not in ("train", "heldout"):
        raise UserError(f"--split {split}: the shapes have the splits train and heldout")
    return ShapesSource(split, resolution, 2 if name == "shapes:two" else 1)


# Recognising an input


def _recognise(name: str, split: str, divided: bool, image_column: str | None, caption_column: str | None) -> _Input:
    if name == "shapes" or name.startswith("shapes:"):
        if name not in ("shapes", "shapes:two"):
            raise UserError(f"--source {name}: the built-in sources are shapes and shapes:two")
        return _Input(name, "shapes", (name,), parts="train and heldout")
    if name.startswith("hf:"):
        return _Input(name, "dataset", (name,), parts="its own")
    if tars.is_remote(name):
        return _Input(name, "tars", (name,))
    path = Path(name).expanduser()
    if path.is_dir():
        return _recognise_folder(name, path, split, divided)
    if not path.is_file():
        raise UserError(f"--source {name}: no such file or folder; give {SOURCE_KINDS}")
    if re.search(r"\.(tar|tar\.\w+|tgz)$", path.name):
        return _Input(name, "tars", (str(path),))
    if path.name.endswith((".json", ".json.gz")):
        return _Input(name, "coco", (str(path),))
    if path.suffix == ".parquet" and not lists_paths(path, image_column, caption_column):
        return _Input(name, "dataset", (str(path),))
    if path.suffix in LIST_SUFFIXES:
        return _Input(name, "list", (str(path),))
    raise UserError(f"--source {name}: is a file of unknown type ({path.suffix or 'no suffix'}); give {SOURCE_KINDS}")


def _recognise_folder(name: str, path: Path, split: str, divided: bool) -> _Input:
    if (path / "annotations").is_dir():
        captions, folder, is_one_of_several = find_captions(path, "train" if divided else split)
        return _Input(name, "coco", (str(captions),), folder, "its captions files" if is_one_of_several else None)
    # Folders named after splits come first. --val_every looks for them too, because it must not mix them.
    inner = [path / part for part in dict.fromkeys([split, "train"] if divided else [split])]
    bases: list[tuple[Path, str | None]] = [(base, f"{base.name}/") for base in inner if base.is_dir()] + [(path, None)]
    for base, parts in bases:
        for metadata in METADATA:
            if (base / metadata).is_file():
                return _Input(name, "list", (str(base / metadata),), parts=parts)
    if huggingface.is_dataset(path):
        return _Input(name, "dataset", (str(path),), parts="its own")
    for base, parts in bases:
        if found := sorted(base.glob("*.tar")):
            return _Input(name, "tars", tuple(map(str, found)), parts=parts)
    for base, parts in bases:
        if has_captioned_images(base):
            return _Input(name, "images", (str(base),), parts=parts)
    found_names = sorted(inside.name for inside in path.iterdir())
    shown = ", ".join(found_names[:5]) + (f" and {len(found_names) - 5} more" if len(found_names) > 5 else "")
    raise UserError(
        f"--source {name}: contains {shown or 'nothing'}; expected annotations/, {METADATA[0]}, {METADATA[1]}, "
        "a dataset, .tar files or images with .txt files"
    )


# Which flags fit which inputs


def _check_parts(places: list[_Input], split: str, val_every: int | None) -> None:
    for place in places:
        if val_every is not None and place.parts and place.kind != "dataset":
            raise UserError(
                f"--val_every {val_every}: --source {place.name} already has splits, {place.parts}; choose one with "
                "--split"
            )
        if val_every is None and not place.parts and split != "train":
            raise UserError(
                f"--split {split}: --source {place.name} has no splits; leave --split out, or use --val_every 100 to "
                "make every hundredth pair val"
            )


def _check_flags(places: list[_Input], image_column: str | None, caption_column: str | None, streaming: bool) -> None:
    kinds, name = {place.kind for place in places}, places[0].name
    for flag, value in (("image_column", image_column), ("caption_column", caption_column)):
        if value is not None and not kinds & {"list", "dataset"}:
            raise UserError(f"--{flag} {value}: needs a list or a Hugging Face dataset; --source {name} is neither")
    if streaming and "dataset" not in kinds:
        raise UserError(f"--streaming: needs a Hugging Face dataset, which --source {name} is not")


def _with_folders(places: list[_Input], given: Sequence[str]) -> list[_Input]:
    """Add the image folder to each input that needs one."""
    takers = [place for place in places if place.kind in ("coco", "list")]
    if given and not takers:
        raise UserError(f"--image_folder {given[0]}: needs COCO or a list, which --source {places[0].name} is not")
    if len(given) not in (0, 1, len(takers)):
        raise UserError(
            f"--image_folder: {len(given)} folders for {len(takers)} captions files; give one, or one for each"
        )
    folders = cycle(Path(folder).expanduser() for folder in given)
    placed = [replace(place, folder=next(folders, place.folder)) if place in takers else place for place in places]
    for place in placed:
        if place.kind == "coco" and place.folder is None:
            raise UserError(f"--source {place.name}: needs --image_folder, the folder that contains its images")
    return placed
