"""COCO captions: one file names the images and has their captions, several for each."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from uvit.errors import UserError
from uvit.sources.files import FileSource, ListRow, build_source, safe_name
from uvit.sources.types import Problem


def open_coco(files: list[Path], image_folder: Path) -> FileSource:
    """Images in the order of the files. An image that several files name is one pair with the captions of all files.

    Raises UserError if a file is not a COCO captions file.
    """
    rows: list[ListRow | Problem] = []
    by_name: dict[str, ListRow] = {}
    for file in files:
        images, annotations = _read(file)
        captions = _captions(annotations)
        seen: set[str] = set()
        for number, image in enumerate(images):
            where = f"{file}, images[{number}]"
            if not isinstance(image, dict) or not isinstance(name := image.get("file_name"), str) or "id" not in image:
                rows.append(Problem(f"{file.name}:{number}", "broken line", f"{where}: has no id or no file_name"))
                continue
            id = safe_name(image["id"])
            if id in seen:
                rows.append(Problem(id, "duplicate id", f"{where}: an earlier image has the same id {id}"))
                continue
            seen.add(id)
            if name in by_name:
                by_name[name].captions.extend(captions.get(id, []))
            else:
                by_name[name] = ListRow(id, name, captions.get(id, []), str(file))
                rows.append(by_name[name])
    return build_source(files[0], image_folder, rows)


def _read(file: Path) -> tuple[list[Any], list[Any]]:
    """(images, annotations)"""
    try:
        data = file.read_bytes()
        content = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"--source {file}: is a damaged or truncated gzip file ({error})") from None
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
        raise UserError(f"--source {file}: its annotations have no `caption`; give a COCO captions file")
    return content["images"], annotations


def _captions(annotations: list[Any]) -> dict[str, list[str]]:
    """{image id: captions}. Annotations of images that are not listed are never looked up."""
    captions: dict[str, list[str]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict):
            caption = annotation.get("caption")
            # A caption that is not a string counts as empty. Only it is dropped if the image has others.
            text = caption if isinstance(caption, str) else ""
            captions.setdefault(safe_name(annotation.get("image_id")), []).append(text)
    return captions


def find_captions(root: Path, split: str) -> tuple[Path, Path | None, bool]:
    """For a folder with annotations/: (captions file, image folder, whether there are several captions files).

    Raises UserError unless `split` selects exactly one of them.
    """
    found = {
        path.name.removeprefix("captions_").removesuffix(".gz").removesuffix(".json"): path
        for pattern in ("captions_*.json.gz", "captions_*.json")  # the second pattern takes precedence
        for path in sorted((root / "annotations").glob(pattern))
    }
    matching = [split] if split in found else sorted(name for name in found if name.startswith(split))
    if not matching and len(found) == 1 and split == "train":
        matching = list(found)  # such as captions_mini2017.json
    if not matching:
        names = ", ".join(path.name for path in found.values()) or "no captions_*.json"
        raise UserError(
            f"--split {split}: {root / 'annotations'} contains {names}; choose one with --split, such as val2014, or "
            "pass the file itself with --image_folder"
        )
    if len(matching) > 1:
        names = " and ".join(found[name].name for name in matching)
        raise UserError(f"--split {split}: could mean {names} in {root / 'annotations'}; pass --split {matching[0]}")
    name = matching[0]
    folders = [folder for folder in (root / name, root / "images" / name, root / "images") if folder.is_dir()]
    return found[name], folders[0] if folders else None, len(found) > 1
