"""Image files on disk that a list or COCO names.

A bad row becomes an unusable pair at its place. A list that is unusable as a whole raises UserError. Opening a source
reads no image.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from uvit.errors import UserError
from uvit.sources.decode import clean_captions, decode_image
from uvit.sources.names import name_on_disk, safe_name
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource

NUM_CHECKED = 100  # images that must include an existing one, or else the folder is wrong


@dataclass(frozen=True)
class ListRow:
    """The path of an image file relative to a folder, and its captions as they are in the list."""

    id: str
    name: str
    captions: list[str]
    where: str  # file and line, for messages


@dataclass(frozen=True)
class FileSource(RandomAccessSource):
    """Image files and their captions. An entry is (id, relative path of the image, captions)."""

    index: str
    folder: str
    entries: list[tuple[str, str, tuple[str, ...]]]
    problems_of: dict[int, tuple[Problem, ...]]  # {row: its problems}

    def __len__(self) -> int:
        return len(self.entries)

    def captions(self, index: int) -> tuple[str, ...]:
        self._check_usable(index)
        return self.entries[index][2]

    def problems(self) -> list[Problem]:
        return [problem for row in sorted(self.problems_of) for problem in self.problems_of[row]]

    def path(self, index: int) -> Path:
        return Path(self.folder) / self.entries[index][1]

    def __getitem__(self, index: int) -> Pair:
        problems = self._check_usable(index)
        id, _, captions = self.entries[index]
        path = self.path(index)
        return Pair(
            id,
            decode_image(read_image_file(path, self.folder, id, self.index), id, safe_name(path)),
            captions,
            problems,
        )

    def _check_usable(self, index: int) -> tuple[Problem, ...]:
        problems = self.problems_of.get(index, ())
        for problem in problems:
            if problem.left_out:
                raise PairError(problem)
        return problems


def build_source(index: Path, folder: Path, rows: Iterable[ListRow | Problem]) -> FileSource:
    """Raises UserError if the list is empty, if no row is usable, or if the images are not in the folder."""
    entries: list[tuple[str, str, tuple[str, ...]]] = []
    problems_of: dict[int, tuple[Problem, ...]] = {}
    for row in rows:
        captions, problems = _cleaned(row)
        if problems:
            problems_of[len(entries)] = problems
        entries.append((row.id, name_on_disk(folder, row.name) if isinstance(row, ListRow) else "", captions))
    source = FileSource(str(index), str(folder), entries, problems_of)
    usable = [row for row, entry in enumerate(entries) if entry[2]]
    if not entries:
        raise UserError(f"--source {index}: lists no images")
    if not usable:
        first = problems_of[0][0].message
        raise UserError(f"--source {index}: none of its {len(entries):,} images is usable; the first problem: {first}")
    checked = [source.path(row) for row in usable[:NUM_CHECKED]]
    if not any(path.is_file() for path in checked):
        number = "its only image" if len(checked) == 1 else f"any of its first {len(checked)} images"
        raise UserError(
            f"--source {index}: cannot find {number}, such as {safe_name(checked[0])}; give the folder that the "
            "paths are relative to as --image_folder"
        )
    return source


def _cleaned(row: ListRow | Problem) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """(captions, problems). No captions: the row is unusable."""
    if isinstance(row, Problem):
        return (), (row,)
    try:
        return clean_captions(row.captions, row.id, row.where)
    except PairError as error:
        return (), (error.problem,)


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
