"""COCO captions: a JSON file that lists the images and several captions for each."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from uvit.errors import UserError
from uvit.sources.files import FileSource, ListRow, build_source
from uvit.sources.names import safe_name
from uvit.sources.types import Problem

CAPTION_FILES = ("captions_*.json.gz", "captions_*.json")  # in annotations/; if both exist, the second is used


def open_coco(files: list[Path], image_folder: Path) -> FileSource:
    """Open the images in the order of the files. Entries with the same file name become one pair with all captions.

    Raises UserError if a file does not contain COCO captions.
    """
    rows: list[ListRow | Problem] = []
    by_name: dict[str, ListRow] = {}
    for file in files:
        images, annotations = _read(file)
        captions = _captions(annotations)
        seen: set[str] = set()
        known = {safe_name(image["id"]) for image in images if isinstance(image, dict) and "id" in image}
        for number, image in enumerate(images):
            where = f"{file}, images[{number}]"
            if not isinstance(image, dict) or not isinstance(name := image.get("file_name"), str) or "id" not in image:
                rows.append(Problem(f"{file.name}:{number}", "broken line", f"{where}: has no id or no file_name"))
                continue
            id = safe_name(image["id"])
            if id in seen:
                rows.append(Problem(id, "duplicate id", f"{where}: an earlier image has the same id, {id}"))
                continue
            seen.add(id)
            if name in by_name:
                by_name[name].captions.extend(captions.get(id, []))
            else:
                by_name[name] = ListRow(id, name, captions.get(id, []), str(file))
                rows.append(by_name[name])
        for id in captions:
            if id not in known:
                message = f"{file}: annotations have the image_id {id}, which no entry of images has"
                rows.append(Problem(id, "missing image", message))
    return build_source(files[0], image_folder, rows)


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
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(
            f"--source {file}: must contain COCO's lists `images` and `annotations`, but contains {found or 'nothing'}"
        )
    annotations = content["annotations"]
    if annotations and not any(isinstance(each, dict) and "caption" in each for each in annotations):
        raise UserError(f"--source {file}: its annotations have no `caption`; give a file of COCO captions")
    return content["images"], annotations


def _captions(annotations: list[Any]) -> dict[str, list[str]]:
    """{id of an image: its captions}, also of images that are not listed."""
    captions: dict[str, list[str]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and annotation.keys() & {"image_id", "caption"}:
            caption = annotation.get("caption")
            # A caption that is not text counts as empty. It is dropped if its image has other captions.
            text = caption if isinstance(caption, str) else ""
            captions.setdefault(safe_name(annotation.get("image_id")), []).append(text)
    return captions


def has_captions(root: Path) -> bool:
    """Whether annotations/ of a folder contains COCO captions."""
    return any(next((root / "annotations").glob(pattern), None) for pattern in CAPTION_FILES)


def find_captions(root: Path, split: str) -> tuple[Path, Path | None, bool]:
    """For a folder with annotations/: (caption file, image folder, whether there are several caption files).

    Raises UserError unless `split` picks exactly one of them.
    """
    found = {
        path.name.removeprefix("captions_").removesuffix(".gz").removesuffix(".json"): path
        for pattern in CAPTION_FILES
        for path in sorted((root / "annotations").glob(pattern))
    }
    matching = [split] if split in found else sorted(name for name in found if name.startswith(split))
    if not matching and len(found) == 1 and split == "train":
        matching = list(found)  # such as captions_mini2017.json
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
    return found[name], folders[0] if folders else None, len(found) > 1
