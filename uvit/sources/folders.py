"""A folder of images, each with a `.txt` (or a `.caption` or `.json`) of the same name that contains its caption."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from uvit.sources.decode import (
    CAPTION_COLUMNS,
    caption_values,
    clean_captions,
    decode_image,
    decode_object,
    decode_text,
)
from uvit.sources.files import NUM_CHECKED, read_image_file
from uvit.sources.img2dataset import failed_rows
from uvit.sources.names import Listing, is_image, list_files, safe_name, stem_of, suffix_of
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, digest_of

CAPTION_SUFFIXES = ("json", "caption", "txt")  # the last of them that an image has counts
DOCUMENTS = {"readme", "license", "licence", "notice", "copying", "changelog", "citation"}  # .txt, but no captions


@dataclass(frozen=True)
class FolderSource(RandomAccessSource):
    """Images of a folder, in the order of their names. A caption is read when its pair is read.

    After the images come the problems that belong to none, such as captions without an image.
    """

    folder: str
    names: list[str]
    caption_files: dict[int, str]  # {row: its caption's file}, where that is not the image's name with .txt
    problem_of: dict[int, Problem]  # {row that is of no use: the problem}
    unread: list[str]  # other files

    def __len__(self) -> int:
        return len(self.names)

    def image_files(self) -> Iterator[Path]:
        return (Path(self.folder, name) for name in self.names if name)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(index)[0]

    def problems(self) -> list[Problem]:
        return list(self.problem_of.values())

    def index_sha256(self) -> str | None:
        """Of the names of the images, and of the names and sizes of the captions."""

        def lines() -> Iterator[bytes]:
            for row, name in enumerate(self.names):
                caption = "" if row in self.problem_of else self._caption_file(row)
                try:
                    size = (Path(self.folder) / caption).stat().st_size if caption else 0
                except OSError:
                    size = -1
                yield f"{name}\0{caption}\0{size}".encode(errors="surrogateescape")

        return digest_of(lines())

    def is_captioned(self) -> bool:
        """Whether at least one image has a caption of its own. Of .json files, some are read to see that."""
        rows = [row for row in range(len(self.names)) if row not in self.problem_of]
        if any(suffix_of(self.caption_files.get(row, ".txt")) != "json" for row in rows):
            return True
        for row in rows[:NUM_CHECKED]:
            try:
                self.captions(row)
            except PairError:
                continue
            return True
        return False

    def __getitem__(self, index: int) -> Pair:
        captions, problems = self._captions(index)
        path, id = Path(self.folder) / self.names[index], safe_name(self.names[index])
        return Pair(
            id,
            decode_image(read_image_file(path, self.folder, id, self.folder), id, safe_name(path)),
            captions,
            problems,
        )

    def _captions(self, index: int) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
        if index in self.problem_of:
            raise PairError(self.problem_of[index])
        file, id = self._caption_file(index), safe_name(self.names[index])
        path = Path(self.folder) / file
        try:
            data = path.read_bytes()
        except OSError as error:
            message = f"{safe_name(path)}: the caption of {id} cannot be read ({error.strerror})"
            raise PairError(Problem(id, "no caption", message)) from None
        where = safe_name(path)
        values = [text := decode_text(data, id, where)]
        if suffix_of(file) == "json":
            values = caption_values(decode_object(text, id, where), CAPTION_COLUMNS, id, where)
        return clean_captions(values, id, where)

    def _caption_file(self, index: int) -> str:
        return self.caption_files.get(index) or stem_of(self.names[index]) + ".txt"


def open_folder(folder: Path, listing: Listing | None = None) -> FolderSource:
    """Open the images at any depth. Hidden files, and those that are neither images nor captions, are `unread`."""
    listing = listing or list_files(folder)
    names = [name for name in listing.files if is_image(name)]
    captions = {name: suffix_of(name) for name in listing.files if suffix_of(name) in CAPTION_SUFFIXES}
    by_stem = {stem_of(name): name for each in CAPTION_SUFFIXES for name, suffix in captions.items() if suffix == each}
    composed = {normalize("NFC", stem): name for stem, name in by_stem.items()}  # an accented letter is one character
    caption_files, problem_of, used = dict[int, str](), dict[int, Problem](), set(names)
    for row, name in enumerate(names):
        caption = by_stem.get(stem_of(name)) or by_stem.get(name)  # photo.txt, or photo.jpg.txt
        caption = caption or composed.get(normalize("NFC", stem_of(name)))
        if caption is None:
            message = f"{safe_name(folder / name)}: has no .txt or .json of the same name that contains its caption"
            problem_of[row] = Problem(safe_name(name), "no caption", message)
            continue
        used.add(caption)
        if caption != stem_of(name) + ".txt":
            caption_files[row] = caption
    of_images = {*names, *map(stem_of, names)}
    others = {stem_of(name): name for name in listing.files if name not in captions and not is_image(name)}
    rest = list[Problem]()
    for name, suffix in captions.items():
        stem = stem_of(name)
        if name in used:
            continue
        if suffix == "json" and stem in of_images:  # what is known of the image beside its .txt
            used.add(name)
        elif suffix != "json" and stem not in of_images and stem.rpartition("/")[2].lower() not in DOCUMENTS:
            beside = others.get(stem)
            used |= {name, beside or name}
            but = f"; {safe_name(beside)} is not in an image format that is read" if beside else ""
            message = f"{safe_name(folder / name)}: there is no image of this name for the caption{but}"
            rest.append(Problem(safe_name(name), "missing image", message))
    rest += listing.problems
    tables = {name: failed_rows(folder / name) for name in listing.top("parquet")}
    beside_folder = failed_rows(folder.parent / f"{folder.name}.parquet")  # of one shard of img2dataset
    rest += [problem for problems in (*tables.values(), beside_folder) for problem in problems or ()]
    problem_of |= dict(enumerate(rest, start=len(names)))
    used |= {name for name, problems in tables.items() if problems is not None}
    rows = names + [problem.id for problem in rest]
    return FolderSource(str(folder), rows, caption_files, problem_of, listing.unread(used))
