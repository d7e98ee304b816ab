"""A folder of images, each with its caption beside it in a .txt of the same name."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uvit.data.decode import IMAGE_SUFFIXES, clean_captions, decode_image, decode_text
from uvit.data.lists import printable, read_image
from uvit.data.types import Pair, PairError, Problem


@dataclass(frozen=True)
class FolderSource:
    """Names of images, relative to a folder, in sorted order; captions are read when asked for."""

    folder: str
    names: list[str]
    bare: dict[int, Problem]  # of the images without a caption file

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(index)[0]

    def problems(self) -> list[Problem]:
        return list(self.bare.values())

    def __getitem__(self, index: int) -> Pair:
        captions, problems = self._captions(index)
        path, id = Path(self.folder) / self.names[index], printable(self.names[index])
        return Pair(
            id, decode_image(read_image(path, self.folder, id, self.folder), id, printable(path)), captions, problems
        )

    def _captions(self, index: int) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
        name = self.names[index]
        if index in self.bare:
            raise PairError(self.bare[index])
        path, id = (Path(self.folder) / name).with_suffix(".txt"), printable(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            message = f"{printable(path)}: the caption of {id} cannot be read ({error.strerror})"
            raise PairError(Problem(id, "no caption", message)) from None
        return clean_captions([decode_text(data, id, printable(path))], id, printable(path))


def open_folder(folder: Path) -> FolderSource:
    """Images at any depth, but for files and folders that begin with a dot."""
    found = sorted(_walk(folder))
    bare = {}
    for row, (name, has_text) in enumerate(found):
        if not has_text:
            message = f"{printable(folder / name)}: has no .txt of the same name, with its caption"
            bare[row] = Problem(printable(name), "no caption", message)
    return FolderSource(str(folder), [name for name, _ in found], bare)


def has_captioned_images(folder: Path) -> bool:
    """Whether one image at least has a .txt of its name."""
    return any(has_text for _, has_text in _walk(folder))


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """(name of an image, whether it has a .txt), in no order."""
    for here, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        prefix = "".join(part + "/" for part in Path(here).relative_to(folder).parts)
        texts = {file.removesuffix(".txt") for file in files if file.endswith(".txt")}
        for file in files:
            stem, _, suffix = file.rpartition(".")
            if suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield prefix + file, stem in texts
