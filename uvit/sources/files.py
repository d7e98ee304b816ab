"""Image files named by a list: lines of JSON (Hugging Face's metadata.jsonl), or a csv, tsv or parquet table.

A bad row stays in its place as an unusable pair. A list that is unusable as a whole raises a UserError. No image is
read before its pair is requested.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvit.errors import UserError
from uvit.sources.decode import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    caption_values,
    clean_captions,
    decode_image,
    decode_object,
    decode_text,
)
from uvit.sources.tables import choose_columns
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource

LIST_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
NUM_LOOKED_FOR = 100  # images, when a list is opened: enough to notice a wrong folder


# The source that a list becomes


@dataclass(frozen=True)
class ListRow:
    """An image file, relative to a folder, and its captions as they were found."""

    id: str
    name: str
    captions: list[str]
    where: str  # file and line, for messages


@dataclass(frozen=True)
class FileSource(RandomAccessSource):
    """Image files and their captions. An entry is (id, name of the image file, captions)."""

    index: str
    folder: str
    entries: list[tuple[str, str, tuple[str, ...]]]
    found: dict[int, tuple[Problem, ...]]  # the problems of each bad row

    def __len__(self) -> int:
        return len(self.entries)

    def captions(self, index: int) -> tuple[str, ...]:
        self._usable(index)
        return self.entries[index][2]

    def problems(self) -> list[Problem]:
        return [problem for row in sorted(self.found) for problem in self.found[row]]

    def path(self, index: int) -> Path:
        return Path(self.folder) / self.entries[index][1]

    def __getitem__(self, index: int) -> Pair:
        problems = self._usable(index)
        id, _, captions = self.entries[index]
        path = self.path(index)
        return Pair(
            id,
            decode_image(read_image_file(path, self.folder, id, self.index), id, safe_name(path)),
            captions,
            problems,
        )

    def _usable(self, index: int) -> tuple[Problem, ...]:
        problems = self.found.get(index, ())
        for problem in problems:
            if problem.left_out:
                raise PairError(problem)
        return problems


def build_source(index: Path, folder: Path, rows: Iterable[ListRow | Problem]) -> FileSource:
    """Raises UserError if the list is empty, no row is usable, or the images are not in `folder`."""
    entries: list[tuple[str, str, tuple[str, ...]]] = []
    found: dict[int, tuple[Problem, ...]] = {}
    for row in rows:
        captions, problems = _cleaned(row)
        if problems:
            found[len(entries)] = problems
        entries.append((row.id, row.name if isinstance(row, ListRow) else "", captions))
    source = FileSource(str(index), str(folder), entries, found)
    usable = [row for row, entry in enumerate(entries) if entry[2]]
    if not entries:
        raise UserError(f"--source {index}: contains no images")
    if not usable:
        first = found[0][0].message
        raise UserError(f"--source {index}: none of its {len(entries):,} images is usable; the first problem: {first}")
    looked_for = [source.path(row) for row in usable[:NUM_LOOKED_FOR]]
    if not any(path.is_file() for path in looked_for):
        number = "its only image" if len(looked_for) == 1 else f"any of its first {len(looked_for)} images"
        raise UserError(
            f"--source {index}: cannot find {number}, such as {safe_name(looked_for[0])}; pass the folder that the "
            "paths are relative to as --image_folder"
        )
    return source


def _cleaned(row: ListRow | Problem) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """(captions, problems); no captions if the row is unusable."""
    if isinstance(row, Problem):
        return (), (row,)
    try:
        return clean_captions(row.captions, row.id, row.where)
    except PairError as error:
        return (), (error.problem,)


def read_image_file(path: Path, folder: str, id: str, where: object) -> bytes:
    """Read an image file below `folder`. Raises PairError, or UserError if the whole folder is gone."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        if not Path(folder).is_dir():
            raise UserError(f"{where}: its image folder {folder} can no longer be read") from None
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"{where}: the image {safe_name(path)} of {id} cannot be read ({reason})"
        raise PairError(Problem(id, "missing image", message)) from None


def safe_name(name: object) -> str:
    """A name that can be printed and stored, whatever bytes it has on disk."""
    return str(name).encode(errors="backslashreplace").decode()


# Kinds of lists


def open_list(
    path: Path, image_folder: Path | None = None, image_column: str | None = None, caption_column: str | None = None
) -> FileSource:
    """Images relative to `image_folder`, or else to the list's own folder. Raises UserError."""
    rows: Iterable[ListRow | Problem]
    if path.suffix == ".jsonl":
        images = (image_column,) if image_column else IMAGE_COLUMNS
        captions = (caption_column,) if caption_column else CAPTION_COLUMNS
        rows = _json_rows(path, images, captions)
    else:
        table = _parquet_rows if path.suffix == ".parquet" else _text_rows
        rows = _by_image(table(path, image_column, caption_column))
    return build_source(path, image_folder or path.parent, rows)


def _json_rows(path: Path, images: Iterable[str], captions: Iterable[str]) -> Iterator[ListRow | Problem]:
    """A row can have all captions of its image, so an image that appears twice is a mistake."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where, id = f"{path}, line {number}", f"{path.name}:{number}"
            try:
                content = decode_object(decode_text(line, id, where), id, where)
                name = next((content[key] for key in images if isinstance(content.get(key), str)), None)
                if not name:
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


def _by_image(rows: Iterable[ListRow | Problem]) -> list[ListRow | Problem]:
    """Merge the rows of the same image into one pair, at the place of the first row."""
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


def _text_rows(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[ListRow | Problem]:
    """A comma- or tab-separated table with standard csv quoting; the first line names the columns."""
    # A path need not be UTF-8. A caption must be, which `clean_captions` checks.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            header = next(reader, [])
            image = _find_column(path, header, "image_column", image_column, IMAGE_COLUMNS)
            caption = _find_column(path, header, "caption_column", caption_column, CAPTION_COLUMNS)
            end = reader.line_num
            for fields in reader:
                start, end = end + 1, reader.line_num
                if not fields:
                    continue
                where = f"{path}, line {start}"
                id = f"{path.name}:{start}"
                if len(fields) > len(header) or len(fields) <= max(image, caption):
                    message = f"{where}: has {len(fields)} fields, but the first line has {len(header)}"
                    yield Problem(id, "broken line", f"{message}; does a caption need quotes?")
                elif path.suffix == ".tsv" and end > start:  # rarely intended: an open quote swallows lines
                    yield Problem(id, "broken line", f"{where}: a field extends to line {end}; is a quote not closed?")
                elif not fields[image]:
                    yield Problem(id, "broken line", f"{where}: names no image")
                else:
                    yield ListRow(safe_name(fields[image]), fields[image], [fields[caption]], where)
        except csv.Error as error:
            message = f"--source {path}: cannot be read at line {reader.line_num} ({error})"
            raise UserError(f"{message}; is a quote not closed there?") from None


def _parquet_rows(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[ListRow | Problem]:
    file = _parquet(path)
    columns = choose_columns(file.schema_arrow, str(path), image_column, caption_column)
    image, caption = columns.image, columns.caption
    for number, row in enumerate(_values(path, file, [image, caption]), start=1):
        where, name = f"{path}, row {number}", row[image]
        if not isinstance(name, str) or not name:
            yield Problem(f"{path.name}:{number}", "broken line", f"{where}: names no image")
            continue
        row[caption] = row[caption] or ""  # null means that there is no caption
        try:
            yield ListRow(safe_name(name), name, caption_values(row, (caption,), safe_name(name), where), where)
        except PairError as error:
            yield error.problem


def _find_column(path: Path, header: list[str], flag: str, given: str | None, usual: Iterable[str]) -> int:
    """The index of the column that the flag names, or else of the first with a usual name."""
    columns = ", ".join(map(repr, header)) or "none"
    if given is not None and given not in header:
        raise UserError(f"--{flag} {given}: the columns of {path} are {columns}; give one of them")
    names = [given] if given is not None else [name for name in usual if name in header]
    if not names:
        raise UserError(f"--source {path}: its columns are {columns}; choose one with --{flag}")
    return header.index(names[0])


def lists_paths(path: Path, image_column: str | None, caption_column: str | None) -> bool:
    """Whether a parquet table has image paths, not image bytes. Raises UserError if it has neither."""
    schema = _parquet(path).schema_arrow
    column = choose_columns(schema, str(path), image_column, caption_column).image
    return "binary" not in str(schema.field(column).type)  # the type is text, bytes, or a struct with bytes


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"--source {path}: parquet files need pyarrow: pip install 'uvit[datasets]'") from None
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
    return UserError(f"--source {path}: is a damaged or truncated parquet file ({reason})")


# A folder of images, each with its caption in a .txt file of the same name


@dataclass(frozen=True)
class FolderSource(RandomAccessSource):
    """Names of images, relative to a folder, in sorted order; captions are read when requested."""

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
        path, id = Path(self.folder) / self.names[index], safe_name(self.names[index])
        return Pair(
            id,
            decode_image(read_image_file(path, self.folder, id, self.folder), id, safe_name(path)),
            captions,
            problems,
        )

    def _captions(self, index: int) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
        name = self.names[index]
        if index in self.bare:
            raise PairError(self.bare[index])
        path, id = (Path(self.folder) / name).with_suffix(".txt"), safe_name(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            message = f"{safe_name(path)}: the caption of {id} cannot be read ({error.strerror})"
            raise PairError(Problem(id, "no caption", message)) from None
        return clean_captions([decode_text(data, id, safe_name(path))], id, safe_name(path))


def open_folder(folder: Path) -> FolderSource:
    """Images at any depth, except in files and folders whose names begin with a dot."""
    found = sorted(_walk(folder))
    bare = {}
    for row, (name, has_text) in enumerate(found):
        if not has_text:
            message = f"{safe_name(folder / name)}: has no .txt file of the same name with its caption"
            bare[row] = Problem(safe_name(name), "no caption", message)
    return FolderSource(str(folder), [name for name, _ in found], bare)


def has_captioned_images(folder: Path) -> bool:
    """Whether at least one image has a .txt file of its name."""
    return any(has_text for _, has_text in _walk(folder))


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """(name of an image, whether it has a .txt file), in arbitrary order."""
    for here, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        prefix = "".join(part + "/" for part in Path(here).relative_to(folder).parts)
        texts = {file.removesuffix(".txt") for file in files if file.endswith(".txt")}
        for file in files:
            stem, _, suffix = file.rpartition(".")
            if suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield prefix + file, stem in texts
