"""Lists that are text: `.jsonl`, `.csv`, `.tsv`.

The separator and the encoding are detected where they are certain. Where they are not, where the names of the columns
are missing, or where a quote is never closed, UserError says so before any image is read.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from uvit.errors import UserError
from uvit.sources.decode import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    caption_values,
    cell_captions,
    decode_object,
    decode_text,
    usual_name,
)
from uvit.sources.files import ListRow
from uvit.sources.img2dataset import hint_of_urls
from uvit.sources.names import is_image, safe_name, suffix_of
from uvit.sources.places import IndexedFile, Place, codec_of, num_bytes, state_of
from uvit.sources.types import PairError, Problem

SEPARATORS = (",", "\t", ";", "|")


@dataclass(frozen=True)
class _TextFile:
    """A text file in the encoding that was detected."""

    path: Path
    encoding: str
    indexed: IndexedFile
    mark: int  # bytes of its byte order mark

    def open(self, newline: str) -> TextIO:
        """Bytes that are not UTF-8 are kept: a path may be valid without being UTF-8. A caption may not."""
        return self.path.open(encoding=self.encoding, errors=self.indexed.errors, newline=newline)

    def num_bytes(self, text: str) -> int:
        return num_bytes(text, self.indexed.codec, self.indexed.errors)

    def where(self, number: int) -> str:
        return f"{self.path}, line {number}"


def _detect(path: Path) -> _TextFile:
    size, modified = state_of(path)
    with path.open("rb") as file:
        head = file.read(4096)
    encoding = _encoding_of(head)
    codec, mark = codec_of(encoding, head)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return _TextFile(path, encoding, IndexedFile(path, codec, errors, size, modified), mark)


def _encoding_of(head: bytes) -> str:
    """UTF-16 and UTF-32 are told by their byte order mark, or by the zeros of ASCII letters. All else is UTF-8."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) == 0 < max(even, odd) and max(even, odd) > len(head) // 4:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8-sig"


class JsonLines:
    """Objects, one a line."""

    def __init__(self, path: Path, image_column: str | None, caption_column: str | None):
        self._file = _detect(path)
        self._images = (image_column,) if image_column else IMAGE_COLUMNS
        self._captions = (caption_column,) if caption_column else CAPTION_COLUMNS
        self.where = self._file.where

    def rows(self) -> Iterator[ListRow | Problem]:
        name, start = self._file.path.name, self._file.mark
        with self._file.open("\n") as file:
            for number, text in enumerate(file, start=1):
                length = self._file.num_bytes(text)
                if text.strip(" \t\n\r\v\f"):
                    try:
                        yield ListRow(*self._row(text, f"{name}:{number}", self.where(number)), number, start, length)
                    except PairError as error:
                        yield error.problem
                start += length

    def read(self, places: list[Place]) -> list[tuple[str, list[str]]]:
        return [self._row(text, "", "") for text in self._file.indexed.read(places)]

    def _row(self, text: str, id: str, where: str) -> tuple[str, list[str]]:
        """Raises PairError."""
        if not text.isascii():
            text = decode_text(text.encode(errors="surrogateescape"), id, where)
        content = decode_object(text, id, where)
        key = usual_name([key for key in content if isinstance(content[key], str)], self._images)
        if key is None or not (name := content[key]):
            keys = ", ".join(map(repr, content)) or "nothing"
            raise PairError(Problem(id, "broken line", f"{where}: has no {' or '.join(self._images)}; found {keys}"))
        return name, caption_values(content, self._captions, safe_name(name), where)


class SeparatedValues:
    """Rows of a `.csv` or `.tsv` file with quotes as in spreadsheets. The first line names the columns."""

    def __init__(self, path: Path, image_column: str | None, caption_column: str | None):
        flags = (("image_column", image_column, IMAGE_COLUMNS), ("caption_column", caption_column, CAPTION_COLUMNS))
        self._file = _detect(path)
        self.where = self._file.where
        self._num_lines, self._start, first = 0, self._file.mark, ""  # the lines up to the first row, and its place
        with self._file.open("") as file:
            for number, line in enumerate(file, start=1):
                self._start += self._file.num_bytes(line)
                if line.strip():
                    self._num_lines, first = number, line
                    break
        try:
            self._separator, header = _header(path, first, flags)
            self._num_columns = len(header)
            self._image, self._caption = (_find_column(path, header, *flag) for flag in flags)
        except csv.Error as error:
            raise self._error(self._num_lines, error) from None

    def rows(self) -> Iterator[ListRow | Problem]:
        path, separator, image, caption = self._file.path, self._separator, self._image, self._caption
        end, place = self._num_lines, self._start
        with self._file.open("") as file:
            for _ in range(end):
                file.readline()
            read: list[str] = []  # lines of the row
            try:
                for fields in csv.reader(_remembered(file, read), delimiter=separator):
                    lines, start, end = read.copy(), end + 1, end + len(read)
                    read.clear()
                    first_byte, size = place, sum(map(self._file.num_bytes, lines))
                    place += size
                    where, id = f"{path}, line {start}", f"{path.name}:{start}"
                    if not fields:
                        continue
                    if _is_open("".join(lines), separator):
                        raise UserError(
                            f"--source {path}: the quote that opens in line {start} is never closed; close it, or write"
                            " it twice and the field in quotes if it belongs to the caption"
                        )
                    if len(lines) > 1 and (
                        separator == "\t" or _holds_a_row(lines[1:], separator, self._num_columns, image)
                    ):
                        yield Problem(
                            id, "broken line", f"{where}: a field continues to line {end}; is a quote missing?"
                        )
                        for number in range(start + 1, end + 1):
                            message = f"{path}, line {number}: is part of a field that begins in line {start}"
                            yield Problem(f"{path.name}:{number}", "broken line", message)
                    elif len(fields) > self._num_columns or len(fields) <= max(image, caption):
                        message = f"{where}: has {len(fields)} fields, but the first line has {self._num_columns}"
                        fits = [
                            each
                            for each in SEPARATORS
                            if len(fields) == 1 and lines[0].count(each) == self._num_columns - 1
                        ]
                        hint = (
                            f"is the separator {fits[0]!r}, not {separator!r}" if fits else "does a caption need quotes"
                        )
                        yield Problem(id, "broken line", f"{message}; {hint}?")
                    elif not fields[image]:
                        yield Problem(id, "broken line", f"{where}: names no image")
                    else:
                        yield ListRow(fields[image], cell_captions(fields[caption]), start, first_byte, size)
            except csv.Error as error:
                raise self._error(end, error) from None

    def read(self, places: list[Place]) -> list[tuple[str, list[str]]]:
        lines = (io.StringIO(text, newline="") for text in self._file.indexed.read(places))
        rows = (next(csv.reader(each, delimiter=self._separator)) for each in lines)
        return [(fields[self._image], cell_captions(fields[self._caption])) for fields in rows]

    def _error(self, line: int, error: csv.Error) -> UserError:
        message = f"--source {self._file.path}: cannot be read after line {line} ({error})"
        return UserError(f"{message}; is a quote missing there?")


def _remembered(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    for line in lines:
        read.append(line)
        yield line


def _is_open(text: str, separator: str) -> bool:
    """Whether a quote that opens in this row is still open at its end, which is then the end of the file."""
    if text.count('"') % 2 == 0:
        return False
    try:
        list(csv.reader([text], delimiter=separator, strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _holds_a_row(lines: list[str], separator: str, num_fields: int, image: int) -> bool:
    """Whether one of these lines of a field is a row itself, so that a quote has swallowed it."""
    rows = (next(csv.reader([line], delimiter=separator), []) for line in lines)
    return any(len(fields) == num_fields and is_image(fields[image]) for fields in rows)


def _header(path: Path, line: str, flags: Iterable[tuple[str, str | None, Sequence[str]]]) -> tuple[str, list[str]]:
    """-> (separator, names of the columns). It is the usual separator, unless another one gives both columns."""
    usual = "\t" if suffix_of(path.name) == "tsv" else ","
    found = {
        separator: [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
        for separator in (usual, *SEPARATORS)
    }
    complete = [
        separator
        for separator, names in found.items()
        if all(usual_name(names, [given] if given else known) for _, given, known in flags)
    ]
    separator = next(iter(complete), max(found, key=lambda each: len(found[each])))
    if not complete and any(map(is_image, found[separator])):
        raise UserError(
            f"--source {path}: its first line must name the columns, such as image and caption, but contains"
            f" {', '.join(map(repr, found[separator]))}; add a line of names"
        )
    return separator, found[separator]


def _find_column(path: Path, header: list[str], flag: str, given: str | None, usual: Sequence[str]) -> int:
    """The index of the column that a flag names, or of the first column with a usual name."""
    columns = ", ".join(map(repr, header)) or "none"
    if given is not None and given not in header:
        raise UserError(f"--{flag} {given}: {path} has no such column; it has {columns}")
    name = given if given is not None else usual_name(header, usual)
    if name is None:
        hint = (hint_of_urls(header) if flag == "image_column" else None) or f"name the one to use with --{flag}"
        raise UserError(f"--source {path}: its columns are {columns}; {hint}")
    return header.index(name)
