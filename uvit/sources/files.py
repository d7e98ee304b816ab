"""Image files on disk that a list or COCO names.

A bad row becomes an unusable pair at its place. A list that is unusable as a whole raises UserError. Opening a source
reads no image. Of a row, only its place is kept: its captions are read from the list when they are needed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from uvit.errors import UserError
from uvit.io import file_sha256
from uvit.sources.decode import clean_captions, decode_image
from uvit.sources.names import is_file, name_on_disk, safe_name
from uvit.sources.places import PairReader, Places
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, digest_of

NUM_CHECKED = 100  # images that must include an existing one, or else the folder is wrong


class ListRow(NamedTuple):
    """A row of a list: the path of an image relative to a folder, and its captions as they are in the list."""

    name: str
    captions: list[str]
    number: int  # of its line or row, from 1
    start: int  # its place
    length: int


@dataclass(frozen=True, eq=False)
class FileSource(RandomAccessSource):
    """Image files and their captions."""

    lists: tuple[str, ...]  # the files that name the images
    folder: str
    places: Places
    reader: PairReader
    problems_of: dict[int, tuple[Problem, ...]]  # {row: its problems}

    def __len__(self) -> int:
        return len(self.places)

    def entry(self, index: int) -> tuple[str, str, tuple[str, ...]]:
        """(id, relative path of the image, captions). An unusable pair has no captions, or not even a path."""
        unusable = next((problem for problem in self.problems_of.get(index, ()) if problem.left_out), None)
        if not (places := self.places[index]):
            assert unusable
            return unusable.id, "", ()
        id, name, captions = self.reader.read(places)
        kept = () if unusable else tuple(caption.strip() for caption in captions if caption.strip())
        return id, name_on_disk(Path(self.folder), name), kept

    def captions(self, index: int) -> tuple[str, ...]:
        self._check_usable(index)
        return self.entry(index)[2]

    def problems(self) -> list[Problem]:
        return [problem for row in sorted(self.problems_of) for problem in self.problems_of[row]]

    def index_sha256(self) -> str | None:
        return digest_of(bytes.fromhex(file_sha256(Path(path))) for path in self.lists)

    def image_files(self) -> Iterator[Path]:
        return (Path(self.folder, name) for name in self.image_names() if name)

    def image_names(self) -> Iterator[str]:
        """The paths of all images, relative to the folder."""
        return (self.entry(row)[1] for row in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        problems = self._check_usable(index)
        id, name, captions = self.entry(index)
        path = Path(self.folder) / name
        return Pair(
            id,
            decode_image(read_image_file(path, self.folder, id, self.lists[0]), id, safe_name(path)),
            captions,
            problems,
        )

    def _check_usable(self, index: int) -> tuple[Problem, ...]:
        problems = self.problems_of.get(index, ())
        for problem in problems:
            if problem.left_out:
                raise PairError(problem)
        return problems


def build_source(
    lists: Sequence[Path],
    folder: Path,
    places: Places,
    reader: PairReader,
    problem_of: dict[int, Problem],
    suspects: Iterable[int],
    where: Callable[[int], str],
) -> FileSource:
    """Raises UserError if the list is empty, if no row is usable, or if the images are not in the folder.

    Args:
        lists: the files that name the images.
        problem_of: {row: the reason why it is no pair}
        suspects: the rows with captions that may be empty, or not text.
        where: the place of a row, for messages.
    """
    problems_of: dict[int, tuple[Problem, ...]] = {row: (problem,) for row, problem in problem_of.items()}
    index = lists[0]
    for row in suspects:
        if row not in problem_of and (problems := _caption_problems(reader, places, row, where(row))):
            problems_of[row] = problems
    source = FileSource(tuple(map(str, lists)), str(folder), places, reader, problems_of)
    if not len(source):
        raise UserError(f"--source {index}: lists no images")
    usable = (row for row in range(len(source)) if not any(each.left_out for each in problems_of.get(row, ())))
    checked = [folder / source.entry(row)[1] for row in islice(usable, NUM_CHECKED)]
    if not checked:
        first = problems_of[0][0].message
        raise UserError(f"--source {index}: none of its {len(source):,} images is usable; the first problem: {first}")
    if not any(map(is_file, checked)):
        number = "its only image" if len(checked) == 1 else f"any of its first {len(checked)} images"
        raise UserError(
            f"--source {index}: cannot find {number}, such as {safe_name(checked[0])}; give the folder that the "
            "paths are relative to as --image_folder"
        )
    return source


def _caption_problems(reader: PairReader, places: Places, row: int, where: str) -> tuple[Problem, ...]:
    id, _, captions = reader.read(places[row])
    try:
        return clean_captions(captions, id, where)[1]
    except PairError as error:
        return (error.problem,)


def is_suspect(caption: str) -> bool:
    """Whether a caption is empty, or not Unicode text."""
    if caption.isascii():
        return not caption or caption.isspace()
    return not is_unicode(caption) or not caption.strip()


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image_file(path: Path, folder: str, id: str, where: object) -> bytes:
    """Read an image file in `folder`. Raises PairError, or UserError if the folder itself cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the name is not a valid file name
        if not Path(folder).is_dir():
            raise UserError(f"{where}: the image folder {folder} can no longer be read") from None
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"{where}: the image {safe_name(path)} of {id} cannot be read ({reason})"
        raise PairError(Problem(id, "missing image", message)) from None
