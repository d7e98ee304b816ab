"""Image files on disk: named by a list (`.jsonl`, `.csv`, `.tsv`, `.parquet`), or in a folder beside `.txt` captions.

A bad row becomes an unusable pair at its place. A list that is unusable as a whole raises UserError. Opening a source
reads no image.
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
NUM_CHECKED = 100  # images that must include an existing one, or else the folder is wrong


# Rows and the source that they make


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
        entries.append((row.id, row.name if isinstance(row, ListRow) else "", captions))
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


def safe_name(name: object) -> str:
    """A form of a name that can be printed and stored as UTF-8, whatever its bytes."""
    return str(name).encode(errors="backslashreplace").decode()


# Kinds of lists


def open_list(
    path: Path, image_folder: Path | None = None, image_column: str | None = None, caption_column: str | None = None
) -> FileSource:
    """Open a list. Its paths are relative to `image_folder`, or else to the list's folder. Raises UserError."""
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
    """A row contains all captions of its image, so an image that appears twice is a problem."""
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


def _text_rows(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[ListRow | Problem]:
    """Rows of a `.csv` or `.tsv` file with quotes as in spreadsheets. The first line names the columns."""
    # A path may be valid without being UTF-8. A caption may not, which is checked later.
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
                    yield Problem(id, "broken line", f"{where}: a field continues to line {end}; is a quote missing?")
                elif not fields[image]:
                    yield Problem(id, "broken line", f"{where}: names no image")
                else:
                    yield ListRow(safe_name(fields[image]), fields[image], [fields[caption]], where)
        except csv.Error as error:
            message = f"--source {path}: cannot be read after line {reader.line_num} ({error})"
            raise UserError(f"{message}; is a quote missing there?") from None


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


def _find_column(path: Path, header: list[str], flag: str, given: str | None, usual: Iterable[str]) -> int:
    """The index of the column that a flag names, or of the first column with a usual name."""
    columns = ", ".join(map(repr, header)) or "none"
    if given is not None and given not in header:
        raise UserError(f"--{flag} {given}: {path} has no such column; it has {columns}")
    names = [given] if given is not None else [name for name in usual if name in header]
    if not names:
        raise UserError(f"--source {path}: its columns are {columns}; name the one to use with --{flag}")
    return header.index(names[0])


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


# Folders of images, each with a .txt of the same name that contains its caption


@dataclass(frozen=True)
class FolderSource(RandomAccessSource):
    """Images of a folder, in the order of their names. A caption is read when its pair is read."""

    folder: str
    names: list[str]
    without_caption: dict[int, Problem]  # {row of an image without a .txt: the problem}

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(index)[0]

    def problems(self) -> list[Problem]:
        return list(self.without_caption.values())

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
        if index in self.without_caption:
            raise PairError(self.without_caption[index])
        path, id = (Path(self.folder) / name).with_suffix(".txt"), safe_name(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            message = f"{safe_name(path)}: the caption of {id} cannot be read ({error.strerror})"
            raise PairError(Problem(id, "no caption", message)) from None
        return clean_captions([decode_text(data, id, safe_name(path))], id, safe_name(path))


def open_folder(folder: Path) -> FolderSource:
    """Open the images at any depth. Names that begin with a dot are ignored."""
    found = sorted(_walk(folder))
    without_caption = {}
    for row, (name, has_text) in enumerate(found):
        if not has_text:
            message = f"{safe_name(folder / name)}: has no .txt of the same name that contains its caption"
            without_caption[row] = Problem(safe_name(name), "no caption", message)
    return FolderSource(str(folder), [name for name, _ in found], without_caption)


def has_captioned_images(folder: Path) -> bool:
    """Whether at least one image has a .txt of the same name."""
    return any(has_text for _, has_text in _walk(folder))


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """(relative path of an image, whether it has a .txt), in any order."""
    for here, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        prefix = "".join(part + "/" for part in Path(here).relative_to(folder).parts)
        texts = {file.removesuffix(".txt") for file in files if file.endswith(".txt")}
        for file in files:
            stem, _, suffix = file.rpartition(".")
            if suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield prefix + file, stem in texts
