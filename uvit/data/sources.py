"""Where pairs come from: built-in shapes, a WebDataset tar, COCO, or a folder with metadata.jsonl.

A source is opened by reading its index; images are decoded when a pair is asked for. All are picklable and
hold no open files, so loader processes may share them.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from uvit.data.shapes import ShapesSource
from uvit.data.types import Pair
from uvit.errors import UserError
from uvit.images import on_white

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
KINDS = "shapes, shapes:two, a .tar, a COCO captions .json, a COCO folder, or a folder with metadata.jsonl"


class Source(Protocol):
    """Pairs in a fixed order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...


def open_source(source: str, split: str = "train", image_folder: str | None = None, resolution: int = 256) -> Source:
    """Find out what `source` is and read its index.

    Args:
        split: `train` or `heldout` of shapes; of folders, the part so named. Files have one part, `train`.
        image_folder: the images of a COCO captions file.
        resolution: at which shapes are drawn; other images keep their size.

    Raises UserError, naming the file and what was found in it, where there is nothing to read.
    """
    path = Path(source).expanduser()
    if image_folder and path.suffix != ".json" and not (path / "annotations").is_dir():
        raise UserError(f"--image_folder {image_folder}: goes with a COCO source, which --source {source} is not")
    if source == "shapes" or source.startswith("shapes:"):
        return _shapes(source, split, resolution)
    if path.is_dir():
        if (path / "annotations").is_dir():
            return _coco_folder(path, split, image_folder)
        return _metadata_folder(path, split)
    if not path.is_file():
        raise UserError(f"--source {source}: no such file or folder; give {KINDS}")
    if split != "train":
        raise UserError(f"--split {split}: --source {source} is one file and has no parts; leave --split out")
    if path.suffix == ".tar":
        return TarSource(path)
    if path.suffix == ".json":
        if not image_folder:
            raise UserError(f"--source {source}: needs --image_folder, the folder with its images")
        return _coco(path, Path(image_folder).expanduser())
    raise UserError(f"--source {source}: is a {path.suffix or 'nameless'} file; give {KINDS}")


def captions_of(source: Source) -> Iterator[str]:
    """All captions in order, without drawing or decoding images."""
    for i in range(len(source)):
        if isinstance(source, ShapesSource):
            yield from source.scenes[i].captions()
        else:
            yield from (source.captions(i) if isinstance(source, TarSource | FileSource) else source[i].captions)


def _shapes(source: str, split: str, resolution: int) -> Source:
    if source not in ("shapes", "shapes:two"):
        raise UserError(f"--source {source}: the built-in sources are shapes and shapes:two")
    if split not in ("train", "heldout"):
        raise UserError(f"--split {split}: shapes have the splits train and heldout")
    return ShapesSource("heldout" if split == "heldout" else "train", resolution, 2 if source == "shapes:two" else 1)


# Files named by a list


@dataclass(frozen=True)
class FileSource:
    """Image files and their captions: an entry is (id, image file, captions)."""

    entries: list[tuple[str, Path, tuple[str, ...]]]

    def __len__(self) -> int:
        return len(self.entries)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.entries[index][2]

    def __getitem__(self, index: int) -> Pair:
        id, path, captions = self.entries[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"pair {id}: the image {path} cannot be read ({error.strerror})") from None
        return Pair(id, _decode(data, id, path), captions)


def _coco_folder(root: Path, split: str, image_folder: str | None) -> Source:
    found = sorted((root / "annotations").glob("captions_*.json"))
    matching = found if len(found) == 1 else [path for path in found if split in path.stem]
    if len(matching) != 1:
        names = ", ".join(path.name for path in found) or "no captions_*.json"
        raise UserError(
            f"--source {root}: --split {split} picks no single captions file of annotations/, which holds"
            f" {names}; name another split, or give the file itself and --image_folder"
        )
    name = matching[0].stem.removeprefix("captions_")
    if image_folder:
        return _coco(matching[0], Path(image_folder).expanduser())
    folders = [folder for folder in (root / name, root / "images" / name, root / "images") if folder.is_dir()]
    if not folders:
        raise UserError(
            f"--source {root}: has neither {name}/ nor images/; name the images' folder with --image_folder"
        )
    return _coco(matching[0], folders[0])


def _coco(annotations: Path, image_folder: Path) -> Source:
    """Images in the file's order; those without captions are no pairs and left out."""
    try:
        content = json.loads(annotations.read_bytes())
    except ValueError as error:
        raise UserError(f"--source {annotations}: is not valid JSON ({error})") from None
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        found = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"--source {annotations}: must hold COCO's `images` and `annotations`, and holds {found}")
    captions: dict[Any, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        listed = [(image["id"], image["file_name"]) for image in content["images"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"--source {annotations}: an image or annotation lacks {error}; are these captions?") from None
    entries = [
        (str(id), image_folder / name, _clean(captions[id], str(id), annotations))
        for id, name in listed
        if id in captions
    ]
    return _checked(entries, annotations)


def _metadata_folder(folder: Path, split: str) -> Source:
    """Hugging Face's imagefolder: metadata.jsonl in the folder, or in a folder for each split."""
    metadata = folder / split / "metadata.jsonl"
    if not metadata.is_file():
        metadata = folder / "metadata.jsonl"
        if not metadata.is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise UserError(
                f"--source {folder}: holds {found}, and no metadata.jsonl, {split}/metadata.jsonl or annotations/"
            )
        if split != "train":
            raise UserError(f"--split {split}: {folder} has no {split}/metadata.jsonl")
    entries = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        row = _json(line, where)
        name = row.get("file_name")
        if not isinstance(name, str):
            raise UserError(f"{where}: has no file_name; found {', '.join(row) or 'nothing'}")
        captions = _clean(_caption_field(row, ("text", "caption", "captions"), where), name, where)
        entries.append((name, metadata.parent / name, captions))
    return _checked(entries, metadata)


def _checked(entries: list[tuple[str, Path, tuple[str, ...]]], index: Path) -> Source:
    if not entries:
        raise UserError(f"--source {index}: lists no image with a caption")
    if not entries[0][1].is_file():  # tells a wrong folder at once; the others are looked at when read
        raise UserError(f"--source {index}: its first image, {entries[0][1]}, does not exist; is the folder right?")
    return FileSource(entries)


# WebDataset


@dataclass(frozen=True)
class _Member:
    """Where a file lies in a tar."""

    suffix: str
    offset: int
    size: int


class TarSource:
    """A WebDataset tar: members of one name up to its first dot are a pair, an image and a .txt or .json.

    A .txt is one caption; in a .json, `caption` or `captions` counts. The headers are read once.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pairs: list[tuple[str, _Member, _Member]] = []  # id, image, captions
        for key, members in _tar_groups(path):
            images = [member for member in members if member.suffix in IMAGE_SUFFIXES]
            texts = [member for suffix in ("txt", "json") for member in members if member.suffix == suffix]
            if len(images) != 1 or not texts:
                found = ", ".join("." + member.suffix for member in members)
                raise UserError(
                    f"--source {path}: {key} must be an image and a .txt or .json of captions, and is {found}"
                )
            self._pairs.append((key, images[0], texts[0]))
        if not self._pairs:
            raise UserError(f"--source {path}: holds no files")

    def __len__(self) -> int:
        return len(self._pairs)

    def captions(self, index: int) -> tuple[str, ...]:
        key, _, member = self._pairs[index]
        where = f"{self.path}, {key}.{member.suffix}"
        try:
            text = self._read(member).decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: is not UTF-8 text") from None
        if member.suffix == "txt":
            return _clean([text], key, where)
        return _clean(_caption_field(_json(text, where), ("caption", "captions"), where), key, where)

    def __getitem__(self, index: int) -> Pair:
        key, image, _ = self._pairs[index]
        return Pair(key, _decode(self._read(image), key, self.path), self.captions(index))

    def _read(self, member: _Member) -> bytes:
        with self.path.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def _tar_groups(path: Path) -> Iterator[tuple[str, list[_Member]]]:
    """(common name, members), in the tar's order."""
    total = path.stat().st_size
    key, members = "", list[_Member]()
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError(f"cut off in {info.name}")
                folder, _, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if f"{folder}/{stem}".lstrip("/") != key:
                    if members:
                        yield key, members
                    key, members = f"{folder}/{stem}".lstrip("/"), []
                members.append(_Member(suffix.lower(), info.offset_data, info.size))
    except tarfile.TarError as error:
        raise UserError(f"--source {path}: is not a whole, uncompressed tar ({error})") from None
    if members:
        yield key, members


# Captions and images


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a JSON object, and is a {type(content).__name__}")
    return content


def _caption_field(row: dict[str, Any], keys: tuple[str, ...], where: str) -> list[str]:
    """The first of `keys` that is there: a caption, or a list of them."""
    value = next((row[key] for key in keys if key in row), None)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(caption, str) for caption in values):
        raise UserError(
            f"{where}: needs {' or '.join(keys)}, a string or a list of strings; found {', '.join(row) or 'nothing'}"
        )
    return values


def _clean(captions: Iterable[str], id: str, where: object) -> tuple[str, ...]:
    cleaned = tuple(str(caption).strip() for caption in captions)
    if not cleaned or not all(cleaned):
        found = "an empty caption" if cleaned else "no caption"
        raise UserError(f"{where}: pair {id} has {found}; write one or leave the pair out")
    return cleaned


def _decode(data: bytes, id: str, where: Path) -> Image.Image:
    """Upright RGB, what is transparent on white."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return on_white(ImageOps.exif_transpose(image))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError: a broken PNG
        raise UserError(
            f"pair {id}: its image in {where} cannot be decoded ({error}); mend it or leave the pair out"
        ) from None
