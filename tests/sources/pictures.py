"""The same captioned pictures, laid out as people have them."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

PICTURES = {  # file name: (colour, captions)
    "b.png": ("blue", ("a blue box", "un carré, bleu")),
    "a.png": ("red", ("红色",)),
    "deep/c.png": ("lime", ('"green", they say', "lime")),
}
ROWS = [(name, caption) for name, (_, captions) in PICTURES.items() for caption in captions]


def png(colour: str, size: tuple[int, int] = (6, 4), mode: str = "RGB", format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format=format)
    return buffer.getvalue()


def write_images(folder: Path) -> Path:
    for name, (colour, _) in PICTURES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(colour))
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("image", "caption")) -> Path:
    """A csv, or a tsv."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


def write_coco(path: Path, images: Sequence[Any], annotations: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}), encoding="utf-8")
    return path


def coco_of_pictures(path: Path) -> Path:
    ids = {name: 10 - number for number, name in enumerate(PICTURES)}
    annotations = [{"image_id": ids[name], "caption": caption} for name, caption in ROWS]
    return write_coco(path, [{"id": id, "file_name": name} for name, id in ids.items()], annotations)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
