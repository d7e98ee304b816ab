"""Lists that name image files and their captions: `.jsonl`, `.csv`, `.tsv`, `.parquet`.

Of a row, only its place is kept. The rows of a list with the same image become one pair.
"""

from array import array
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import islice
from os.path import normpath
from pathlib import Path
from typing import Protocol

import numpy as np

from uvit.errors import UserError
from uvit.sources.files import NUM_CHECKED, FileSource, ListRow, build_source, is_suspect, is_unicode
from uvit.sources.names import SPLITS, is_file, name_on_disk, safe_name, suffix_of
from uvit.sources.parquet_lists import ParquetRows
from uvit.sources.places import Place, PlaceList, Places, first_of_each, number_equal
from uvit.sources.text_lists import JsonLines, SeparatedValues
from uvit.sources.types import Problem

LIST_SUFFIXES = ("jsonl", "csv", "tsv", "parquet")


class ListRows(Protocol):
    """The rows of a list, in order or by their places. Picklable."""

    def rows(self) -> Iterator[ListRow | Problem]: ...
    def read(self, places: list[Place]) -> list[tuple[str, list[str]]]:
        """(path of the image, captions) of each of these rows."""
        ...

    def where(self, number: int) -> str:
        """The place of a row, for messages."""
        ...


@dataclass(frozen=True)
class ListReader:
    """Reads pairs of a list."""

    rows: ListRows
    prefix: Path | None  # of the images

    def read(self, places: list[Place]) -> tuple[str, str, list[str]]:
        rows = self.rows.read(places)
        name = rows[0][0] if self.prefix is None else str(self.prefix / rows[0][0])
        return safe_name(name), name, [caption for _, captions in rows for caption in captions]


def open_list(
    path: Path,
    image_folder: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    base: Path | None = None,
    split: str | None = None,
) -> FileSource:
    """Open a list. Its paths are relative to `image_folder`, or else to the list's folder. Raises UserError.

    Args:
        base: a folder that contains the list's: the ids of its images are then their paths from there.
        split: leave out images in the folders of other splits.
    """
    prefix = None
    if image_folder is None and base is not None and path.parent != base:
        prefix, image_folder = path.parent.relative_to(base), base
    is_table = suffix_of(path.name) != "jsonl"
    places, numbers, suspects, problem_at = PlaceList(), array("I"), array("q"), dict[int, Problem]()
    captions = _CaptionEncoding(path)
    try:
        rows = _rows(path, image_column, caption_column)
        for at, row in enumerate(row for row in rows.rows() if not is_of_another_split(row, split)):
            captions.add(at, row)
            if isinstance(row, Problem):
                problem_at[at] = row
                places.add(f"\0{at}")  # no file has this name
                numbers.append(0)
                continue
            name = normpath(row.name) if "./" in row.name or "//" in row.name else row.name  # ./a.png is a.png
            places.add(str(prefix / name) if prefix and is_table else name, row.start, row.length)
            numbers.append(row.number)
            if not row.captions or any(map(is_suspect, row.captions)):
                suspects.append(at)
    except UnicodeDecodeError as error:
        raise UserError(f"--source {path}: is damaged {error.encoding.upper()} text ({error.reason})") from None
    pairs = number_equal(*places.keys())
    first_rows = np.flatnonzero(first_of_each(pairs))
    captions.check(problem_at, lambda at: rows.where(numbers[at]))
    is_good = np.ones(len(pairs), bool)
    is_good[list(problem_at)] = False
    order = np.argsort(pairs, kind="stable")
    order = order[is_good[order]]
    firsts = np.concatenate([[0], np.cumsum(np.bincount(pairs[is_good], minlength=len(first_rows)))])
    starts, lengths = places.places()
    return build_source(
        [path],
        image_folder or path.parent,
        Places(firsts, starts[order], lengths[order]),
        ListReader(rows, prefix),
        {int(pairs[at]): problem for at, problem in problem_at.items()},
        np.unique(pairs[np.frombuffer(suspects, np.int64)]).tolist(),
        lambda pair: rows.where(numbers[first_rows[pair]]),
    )


def is_of_another_split(row: ListRow | Problem, split: str | None) -> bool:
    """Whether the image of a row is of another split: that of its folder, such as val/, or else train."""
    if split is None or isinstance(row, Problem):
        return False
    folder, slash, _ = row.name.removeprefix("./").partition("/")
    return (folder if slash and folder in (*SPLITS, split) else "train") != split


def names_images(path: Path, image_column: str | None, caption_column: str | None) -> bool:
    """Whether this is a list, and one of the first images that it names exists."""
    captions, names = _CaptionEncoding(path), set[str]()
    try:
        first = list(islice(_rows(path, image_column, caption_column).rows(), NUM_CHECKED))
        for at, row in enumerate(first):
            captions.add(at, row)
            if not isinstance(row, Problem):
                names.add(row.name)
        if len(first) < NUM_CHECKED:
            captions.check((), str)
    except (UserError, OSError, UnicodeDecodeError):
        return False
    return any(is_file(path.parent / name_on_disk(path.parent, name)) for name in names)


def _rows(path: Path, image_column: str | None, caption_column: str | None) -> ListRows:
    if suffix_of(path.name) == "parquet":
        return ParquetRows(path, image_column, caption_column)
    return (JsonLines if suffix_of(path.name) == "jsonl" else SeparatedValues)(path, image_column, caption_column)


class _CaptionEncoding:
    """Which rows have captions that are not ASCII."""

    def __init__(self, path: Path):
        self.path = path
        self._good, self._bad, self._messages = array("q"), array("q"), dict[int, str]()

    def add(self, at: int, row: ListRow | Problem) -> None:
        if isinstance(row, Problem):
            if row.kind == "not UTF-8":
                self._messages[at] = row.message
        elif not all(map(str.isascii, row.captions)):
            (self._good if all(map(is_unicode, row.captions)) else self._bad).append(at)

    def check(self, left_out: Container[int], where: Callable[[int], str]) -> None:
        """Raises UserError if the captions are not UTF-8: a single one may be broken, but not most."""
        num_good = sum(at not in left_out for at in self._good)
        bad = self._messages | {at: f"{where(at)}: is not UTF-8 text" for at in self._bad if at not in left_out}
        if len(bad) > max(1, num_good):
            raise UserError(
                f"--source {self.path}: its text is not UTF-8 ({len(bad):,} rows; the first: {bad[min(bad)]});"
                " convert the file, for example with `iconv -f GB18030 -t UTF-8` if it is Chinese, or"
                " `iconv -f LATIN1 -t UTF-8`"
            )
