"""Lists that name image files and their captions: `.jsonl`, `.csv`, `.tsv`, `.parquet`.

The separator and the encoding of a text list are detected where they are certain. Where they are not, where the names
of the columns are missing, or where a quote is never closed, UserError says so before any image is read.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from uvit.errors import UserError
from uvit.sources.decode import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    caption_values,
    decode_object,
    decode_text,
    usual_name,
)
from uvit.sources.files import NUM_CHECKED, FileSource, ListRow, build_source
from uvit.sources.img2dataset import hint_of_urls
from uvit.sources.names import is_image, name_on_disk, safe_name, suffix_of
from uvit.sources.tables import choose_columns
from uvit.sources.types import PairError, Problem

LIST_SUFFIXES = ("jsonl", "csv", "tsv", "parquet")
SEPARATORS = (",", "\t", ";", "|")

Rows = Iterator[ListRow | Problem]


def open_list(
    path: Path,
    image_folder: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    base: Path | None = None,
) -> FileSource:
    """Open a list. Its paths are relative to `image_folder`, or else to the list's folder. Raises UserError.

    Args:
        base: a folder that contains the list's: the ids of its images are then their paths from there.
    """
    rows: Iterable[ListRow | Problem] = _rows(path, image_column, caption_column)
    if image_folder is None and base is not None and path.parent != base:
        rows, image_folder = _below(path.parent.relative_to(base), rows), base
    return build_source(path, image_folder or path.parent, rows if suffix_of(path.name) == "jsonl" else _by_image(rows))


def _below(folder: Path, rows: Iterable[ListRow | Problem]) -> Iterator[ListRow | Problem]:
    for row in rows:
        name = str(folder / row.name) if isinstance(row, ListRow) else ""
        yield replace(row, id=safe_name(name), name=name) if isinstance(row, ListRow) else row


def names_images(path: Path, image_column: str | None, caption_column: str | None) -> bool:
    """Whether this is a list, and one of the first images that it names exists."""
    try:
        rows = list(islice(_rows(path, image_column, caption_column), NUM_CHECKED))
    except (UserError, OSError):
        return False
    names = [name_on_disk(path.parent, row.name) for row in rows if isinstance(row, ListRow)]
    return any((path.parent / name).is_file() for name in names)


def _rows(path: Path, image_column: str | None, caption_column: str | None) -> Rows:
    if suffix_of(path.name) == "parquet":
        return _parquet_rows(path, image_column, caption_column)
    rows = _json_rows if suffix_of(path.name) == "jsonl" else _text_rows
    return _one_encoding(path, rows(path, image_column, caption_column))


def _by_image(rows: Iterable[ListRow | Problem]) -> list[ListRow | Problem]:
    """Rows of a table with the same image become one pair, at the place of the first."""
    joined: list[ListRow | Problem] = []
    known: dict[str, ListRow] = {}
    for row in rows:
        if isinstance(row, ListRow) and row.name in known:
            known[row.name].captions.extend(row.captions)
            continue
        if isinstance(row, ListRow):
            known[row.name] = row
        joined.append(row)
    return joined


# Text


def _encoding_of(path: Path) -> str:
    """UTF-16 and UTF-32 are told by their byte order mark, or by the zeros of ASCII letters. All else is UTF-8."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) == 0 < max(even, odd) and max(even, odd) > len(head) // 4:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8-sig"


def _open_text(path: Path, newline: str) -> TextIO:
    """Bytes that are not UTF-8 are kept: a path may be valid without being UTF-8. A caption may not."""
    encoding = _encoding_of(path)
    return path.open(encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else None, newline=newline)


def _one_encoding(path: Path, rows: Rows) -> Rows:
    """The same rows. Raises UserError if their captions are not UTF-8: a single one may be broken, but not most."""
    num_good, bad = 0, list[str]()
    try:
        for row in rows:
            captions = row.captions if isinstance(row, ListRow) else []
            if isinstance(row, Problem) and row.kind == "not UTF-8":
                bad.append(row.message)
            elif not all(map(str.isascii, captions)):
                if all(map(_is_unicode, captions)):
                    num_good += 1
                elif isinstance(row, ListRow):
                    bad.append(f"{row.where}: is not UTF-8 text")
            yield row
    except UnicodeDecodeError as error:
        raise UserError(f"--source {path}: is damaged {error.encoding.upper()} text ({error.reason})") from None
    if len(bad) > max(1, num_good):
        raise UserError(
            f"--source {path}: its text is not UTF-8 ({len(bad):,} rows; the first: {bad[0]}); convert the file, for"
            f" example with `iconv -f GB18030 -t UTF-8` if it is Chinese, or `iconv -f LATIN1 -t UTF-8`"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(path: Path, image_column: str | None, caption_column: str | None) -> Rows:
    """A row contains all captions of its image, so an image that appears twice is a problem."""
    images = (image_column,) if image_column else IMAGE_COLUMNS
    captions = (caption_column,) if caption_column else CAPTION_COLUMNS
    seen: set[str] = set()
    with _open_text(path, "\n") as file:
        for number, text in enumerate(file, start=1):
            line = text.encode(errors="surrogateescape")
            if not line.strip():
                continue
            where, id = f"{path}, line {number}", f"{path.name}:{number}"
            try:
                content = decode_object(decode_text(line, id, where), id, where)
                key = usual_name([key for key in content if isinstance(content[key], str)], images)
                if key is None or not (name := content[key]):
                    keys = ", ".join(map(repr, content)) or "nothing"
                    message = f"{where}: has no {' or '.join(images)}; found {keys}"
                    raise PairError(Problem(id, "broken line", message))
                id = safe_name(name)
                row = ListRow(id, name, caption_values(content, captions, id, where), where)
                if name in seen:
                    raise PairError(Problem(id, "duplicate id", f"{where}: {id} already has an earlier line"))
            except PairError as error:
                yield error.problem
            else:
                seen.add(name)
                yield row


def _text_rows(path: Path, image_column: str | None, caption_column: str | None) -> Rows:
    """Rows of a `.csv` or `.tsv` file with quotes as in spreadsheets. The first line names the columns."""
    flags = (("image_column", image_column, IMAGE_COLUMNS), ("caption_column", caption_column, CAPTION_COLUMNS))
    with _open_text(path, "") as file:
        end, first = next(((number, line) for number, line in enumerate(file, start=1) if line.strip()), (0, ""))
        read: list[str] = []  # lines of the row
        try:
            separator, header = _header(path, first, flags)
            image, caption = (_find_column(path, header, *flag) for flag in flags)
            for fields in csv.reader(_remembered(file, read), delimiter=separator):
                lines, start, end = read.copy(), end + 1, end + len(read)
                read.clear()
                where, id = f"{path}, line {start}", f"{path.name}:{start}"
                if not fields:
                    continue
                if _is_open("".join(lines), separator):
                    raise UserError(
                        f"--source {path}: the quote that opens in line {start} is never closed; close it, or write it"
                        " twice and the field in quotes if it belongs to the caption"
                    )
                if len(lines) > 1 and (separator == "\t" or _holds_a_row(lines[1:], separator, len(header), image)):
                    yield Problem(id, "broken line", f"{where}: a field continues to line {end}; is a quote missing?")
                    for number in range(start + 1, end + 1):
                        message = f"{path}, line {number}: is part of a field that begins in line {start}"
                        yield Problem(f"{path.name}:{number}", "broken line", message)
                elif len(fields) > len(header) or len(fields) <= max(image, caption):
                    message = f"{where}: has {len(fields)} fields, but the first line has {len(header)}"
                    fits = [each for each in SEPARATORS if len(fields) == 1 and lines[0].count(each) == len(header) - 1]
                    hint = f"is the separator {fits[0]!r}, not {separator!r}" if fits else "does a caption need quotes"
                    yield Problem(id, "broken line", f"{message}; {hint}?")
                elif not fields[image]:
                    yield Problem(id, "broken line", f"{where}: names no image")
                else:
                    yield ListRow(safe_name(fields[image]), fields[image], [fields[caption]], where)
        except csv.Error as error:
            message = f"--source {path}: cannot be read after line {end} ({error})"
            raise UserError(f"{message}; is a quote missing there?") from None


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


def _parquet_rows(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[ListRow | Problem]:
    file = _parquet(path)
    columns = choose_columns(file.schema_arrow, str(path), image_column, caption_column)
    image, caption = columns.image, columns.caption
    for number, row in enumerate(_values(path, file, [image, caption]), start=1):
        where, name = f"{path}, row {number}", row[image]
        if not isinstance(name, str) or not name:
            yield Problem(f"{path.name}:{number}", "broken line", f"{where}: names no image")
            continue
        row[caption] = row[caption] or ""  # a null is an absent caption
        try:
            yield ListRow(safe_name(name), name, caption_values(row, (caption,), safe_name(name), where), where)
        except PairError as error:
            yield error.problem


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


def lists_paths(path: Path, image_column: str | None, caption_column: str | None) -> bool:
    """Whether a parquet table contains paths of images, not the images. Raises UserError for other tables."""
    schema = _parquet(path).schema_arrow
    column = choose_columns(schema, str(path), image_column, caption_column).image
    return "binary" not in str(schema.field(column).type)  # the type is text, bytes, or a struct with bytes


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"--source {path}: reading parquet files needs pyarrow: pip install 'uvit[datasets]'") from None
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise _damaged(path, error) from None


def _values(path: Path, file: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException

    try:
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"--source {path}: is not a complete parquet file ({reason})")
