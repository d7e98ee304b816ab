"""COCO captions: a JSON file that lists the images and several captions for each.

The file is parsed entry by entry, and only the places of the entries are kept.
"""

import gzip
import json
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from uvit.errors import UserError, a_type
from uvit.sources.files import FileSource, build_source, is_suspect
from uvit.sources.json_entries import Entry, UnusualError, read_entries
from uvit.sources.names import safe_name, split_of
from uvit.sources.places import (
    IndexedFile,
    Place,
    PlaceList,
    Places,
    codec_of,
    first_of_each,
    number_equal,
    state_of,
)
from uvit.sources.types import Problem

CAPTION_FILES = ("captions_*.json.gz", "captions_*.json")  # in annotations/; if both exist, the second is used
ENTRIES = ("images", "annotations")


@dataclass(frozen=True)
class CocoReader:
    """Reads entries again. The places of a file follow on those of the file before it."""

    files: list["IndexedFile | bytes"]  # bytes: the entries of a compressed file
    ends: list[int]  # of the places in each file

    def read(self, places: list[Place]) -> tuple[str, str, list[str]]:
        image, *annotations = self.entries(places)
        return safe_name(image["id"]), image["file_name"], [_caption_of(annotation) for annotation in annotations]

    def entries(self, places: list[Place]) -> list[Any]:
        found: list[Any] = []
        for number, group in groupby(places, key=lambda place: bisect_right(self.ends, place[0])):
            base, file = self.ends[number - 1] if number else 0, self.files[number]
            here = [(start - base, length) for start, length in group]
            if isinstance(file, IndexedFile):
                found += map(json.loads, file.read(here))
            else:
                found += (json.loads(file[at : at + length].decode(errors="surrogatepass")) for at, length in here)
        return found


class _Listed:
    """The entries of one file."""

    def __init__(self, file: Path, whole: bool, kept: bytearray | None):
        self.file, self.whole = file, whole
        self.kept = kept  # what is needed of the entries; None: they can be read from the file again
        self.image_ids, self.image_names, self.annotations = PlaceList(), PlaceList(), PlaceList()
        self.broken = dict[int, Problem]()  # {number of an image: the problem}
        self.suspects = array("q")  # annotations
        self.num_annotations, self.has_captions = 0, False

    def add(self, entries: Iterable[Entry]) -> "_Listed":
        for key, entry, start, length in entries:
            if key == "images":
                self._add_image(entry, start, length)
            else:
                self._add_annotation(entry, start, length)
        return self

    def _add_image(self, image: Any, start: int, length: int) -> None:
        number = len(self.image_ids)
        has_id = isinstance(image, dict) and "id" in image
        # An image without an id is equal to no other one; a text that is printed has no such character.
        self.image_ids.add_key(_text_of(image["id"]) if has_id else f"\ud800{number}")
        if not has_id or not isinstance(name := image.get("file_name"), str):
            message = f"{self.file}, images[{number}]: has no id or no file_name"
            self.broken[number] = Problem(f"{self.file.name}:{number}", "broken line", message)
            self.image_names.add(f"\ud800{number}")
            return
        if self.kept is not None:
            start, length = self._keep({"id": image["id"], "file_name": name})
        self.image_names.add(name, start, length)

    def _add_annotation(self, annotation: Any, start: int, length: int) -> None:
        self.num_annotations += 1
        if _has_caption(annotation):
            self.has_captions = self.has_captions or "caption" in annotation
            caption = _caption_of(annotation)
            if is_suspect(caption):
                self.suspects.append(len(self.annotations))
            if self.kept is not None:
                start, length = self._keep(caption)
            self.annotations.add(_text_of(annotation.get("image_id")), start, length)

    def _keep(self, entry: Any) -> Place:
        assert self.kept is not None
        start, text = len(self.kept), json.dumps(entry, ensure_ascii=False).encode(errors="surrogatepass")
        self.kept += text
        return start, len(text)

    def read_ids(self, key: str, numbers: list[int]) -> list[str]:
        """The ids that these entries of a list name. The file is parsed again, if there are any."""
        if not numbers:
            return []
        field, wanted = "id" if key == "images" else "image_id", set(numbers)
        entries = (entry for name, entry, *_ in _entries(self.file, self.whole) if name == key)
        counted = entries if key == "images" else filter(_has_caption, entries)
        return [safe_name(entry.get(field)) for number, entry in enumerate(counted) if number in wanted]


def _has_caption(annotation: Any) -> bool:
    return isinstance(annotation, dict) and ("caption" in annotation or "image_id" in annotation)


def _text_of(id: Any) -> str:
    return str(id) if type(id) is int else safe_name(id)


def _caption_of(annotation: Any) -> str:
    """A caption that is not text counts as empty. It is dropped if its image has other captions."""
    caption = annotation.get("caption") if isinstance(annotation, dict) else annotation
    return caption if isinstance(caption, str) else ""


def open_coco(files: list[Path], image_folder: Path) -> FileSource:
    """Open the images in the order of the files. Entries with the same file name become one pair with all captions.

    Raises UserError if a file does not contain COCO captions.
    """
    reader, matched = CocoReader([], []), list[_Matched]()
    num_items, end = 0, 0
    for file in files:
        listed, opened = _list_file(file)
        matched.append(_match(listed, num_items, end))
        num_items += matched[-1].num_items
        end += opened.size if isinstance(opened, IndexedFile) else len(opened)
        reader.files.append(opened)
        reader.ends.append(end)
        del listed  # the places of its images are in `matched`
    items = np.concatenate([each.items for each in matched])
    names = number_equal(*(np.concatenate(keys) for keys in zip(*[each.name_keys for each in matched], strict=True)))
    is_first = first_of_each(names)
    is_row = np.ones(num_items, bool)
    is_row[items[~is_first]] = False
    row_of_item = np.cumsum(is_row) - 1
    row_of_item[items] = row_of_item[items[is_first]][names]
    # Images of one row follow one another, each with its captions.
    ranks = np.empty(num_items, np.int64)
    ranks[items[np.argsort(row_of_item[items], kind="stable")]] = np.arange(len(items))
    item_of_part = np.concatenate([items[is_first], *(each.annotation_items for each in matched)])
    order = np.argsort(ranks[item_of_part], kind="stable")
    counts = np.bincount(row_of_item[item_of_part], minlength=int(is_row.sum()))
    starts, lengths = (
        np.concatenate(
            [np.concatenate([each.images[i] for each in matched])[is_first], *(each.annotations[i] for each in matched)]
        )[order]
        for i in (0, 1)
    )
    suspects = row_of_item[np.concatenate([each.suspect_items for each in matched])]
    first_items = np.cumsum([0, *(each.num_items for each in matched)])
    item_of_row = np.flatnonzero(is_row)
    return build_source(
        files,
        image_folder,
        Places(np.concatenate([[0], np.cumsum(counts)]), starts, lengths),
        reader,
        {int(row_of_item[item]): problem for each in matched for item, problem in each.problems.items()},
        np.union1d(suspects, np.flatnonzero(counts == 1)).tolist(),
        lambda row: str(files[np.searchsorted(first_items, item_of_row[row], "right") - 1]),
    )


@dataclass
class _Matched:
    """Items of one file: its images in order, then the images that only annotations name. Their numbers
    go on from the file before."""

    num_items: int
    problems: dict[int, Problem]  # {item: why it is no pair}
    items: np.ndarray  # (N,): of the images that are of use
    name_keys: tuple[np.ndarray, np.ndarray]  # (N,)
    images: tuple[np.ndarray, np.ndarray]  # (N,): their places
    annotation_items: np.ndarray  # (M,): of the annotations of these images
    annotations: tuple[np.ndarray, np.ndarray]  # (M,): their places
    suspect_items: np.ndarray


def _match(listed: "_Listed", first_item: int, first_place: int) -> _Matched:
    """Find the image of each annotation."""
    num_images = len(listed.image_ids)
    keys = zip(listed.image_ids.keys(), listed.annotations.keys(), strict=True)
    ids = number_equal(*map(np.concatenate, keys))
    image_ids, annotation_ids = ids[:num_images], ids[num_images:]
    num_ids = int(image_ids.max(initial=-1)) + 1
    names, names_keys = listed.image_names.places(), listed.image_names.keys()
    # Images
    valid = np.setdiff1d(np.arange(num_images), list(listed.broken), assume_unique=True)
    used = valid[np.sort(np.unique(image_ids[valid], return_index=True)[1])]
    problems = dict(listed.broken)
    repeated = np.setdiff1d(valid, used, assume_unique=True).tolist()
    for number, id in zip(repeated, listed.read_ids("images", repeated), strict=True):
        message = f"{listed.file}, images[{number}]: an earlier image has the same id, {id}"
        problems[number] = Problem(id, "duplicate id", message)
    # Annotations
    highest = np.maximum.accumulate(np.concatenate([np.array([num_ids - 1], ids.dtype), annotation_ids]))
    strangers = np.flatnonzero(annotation_ids > highest[:-1]).tolist()
    del highest
    for number, id in enumerate(listed.read_ids("annotations", strangers), start=num_images):
        message = f"{listed.file}: annotations have the image_id {id}, which no entry of images has"
        problems[number] = Problem(id, "missing image", message)
    item_of_id = np.full(ids.max(initial=-1) + 1, -1, ids.dtype)
    item_of_id[image_ids[used]] = used
    items = item_of_id[annotation_ids]
    suspects = items[np.frombuffer(listed.suspects, np.int64)]
    has_image = items >= 0
    starts, lengths = listed.annotations.places()
    return _Matched(
        num_images + len(strangers),
        {first_item + number: problem for number, problem in problems.items()},
        first_item + used,
        (names_keys[0][used], names_keys[1][used]),
        (first_place + names[0][used], names[1][used]),
        first_item + items[has_image],
        (first_place + starts[has_image], lengths[has_image]),
        first_item + suspects[suspects >= 0],
    )


def _entries(file: Path, whole: bool) -> Iterator[Entry]:
    """Entries, with their places unless the file is parsed as a whole."""
    if whole:
        for key, content in zip(ENTRIES, _read(file), strict=True):
            yield from ((key, entry, 0, 0) for entry in content)
        return
    with _open(file) as opened:
        yield from read_entries(opened, ENTRIES)


def _open(file: Path) -> Any:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def _list_file(file: Path) -> tuple[_Listed, IndexedFile | bytes]:
    """The entries, and what they can be read from again. Raises UserError."""
    size, modified = state_of(file)
    listed = _Listed(file, whole=False, kept=bytearray() if file.suffix.lower() == ".gz" else None)
    try:
        listed.add(_entries(file, whole=False))
        if listed.num_annotations and not listed.has_captions:
            raise UnusualError("has no captions")
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error):
        # Parsed as a whole, it gives an error that describes it, or is unusual: a list may be there twice.
        listed = _Listed(file, whole=True, kept=bytearray()).add(_entries(file, whole=True))
    if listed.kept is not None:
        return listed, bytes(listed.kept)
    with file.open("rb") as opened:
        head = opened.read(4)
    return listed, IndexedFile(file, codec_of(json.detect_encoding(head), head)[0], "surrogatepass", size, modified)


def _read(file: Path) -> tuple[list[Any], list[Any]]:
    """(images, annotations)"""
    try:
        data = file.read_bytes()
        content = json.loads(gzip.decompress(data) if file.suffix.lower() == ".gz" else data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"--source {file}: is not a complete gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--source {file}: is not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--source {file}: is not valid JSON ({error})") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else a_type(content)
        raise UserError(
            f"--source {file}: must contain COCO's lists `images` and `annotations`, but contains {found or 'nothing'}"
        )
    annotations = content["annotations"]
    if annotations and not any(isinstance(each, dict) and "caption" in each for each in annotations):
        raise UserError(f"--source {file}: its annotations have no `caption`; give a file of COCO captions")
    return content["images"], annotations


def has_captions(root: Path) -> bool:
    """Whether annotations/ of a folder contains COCO captions."""
    return any(next((root / "annotations").glob(pattern), None) for pattern in CAPTION_FILES)


def find_captions(root: Path, split: str | None) -> tuple[Path, Path | None, bool]:
    """For a folder with annotations/: (caption file, image folder, whether its name has a split).

    Raises UserError unless `split` picks exactly one of them, or there is only one (split None).
    """
    found = {
        path.name.removeprefix("captions_").removesuffix(".gz").removesuffix(".json"): path
        for pattern in CAPTION_FILES
        for path in sorted((root / "annotations").glob(pattern))
    }
    if len(found) == 1 and (split is None or (split == "train" and split_of(next(iter(found))) is None)):
        split = next(iter(found))  # such as mini2017
        has_splits = False
    else:
        split = split or "train"
        has_splits = len(found) > 1 or split != "train"
    matching = [split] if split in found else sorted(name for name in found if name.startswith(split))
    if not matching:
        names = ", ".join(path.name for path in found.values()) or "no captions_*.json"
        raise UserError(
            f"--split {split}: {root / 'annotations'} contains {names}; name one with --split, such as val2014, or "
            "give the file itself and --image_folder"
        )
    if len(matching) > 1:
        names = " and ".join(found[name].name for name in matching)
        raise UserError(
            f"--split {split}: matches {names} in {root / 'annotations'}; give for example --split {matching[0]}"
        )
    name = matching[0]
    folders = [folder for folder in (root / name, root / "images" / name, root / "images") if folder.is_dir()]
    return found[name], folders[0] if folders else None, has_splits
