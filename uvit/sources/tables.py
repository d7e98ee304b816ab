"""Tables of pairs: one column contains the images, one the captions, and sometimes one the ids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from uvit.errors import UserError
from uvit.sources.decode import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    caption_values,
    clean_captions,
    decode_image,
    usual_name,
)
from uvit.sources.img2dataset import REASONS, hint_of_urls, reason
from uvit.sources.names import list_files
from uvit.sources.places import PlaceList, first_of_each, number_equal
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, Source

# Not image_id: an image may have several rows, each with one caption.
ID_COLUMNS = ("id", "key", "__key__")

TableRow = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    image: str
    caption: str
    id: str | None  # None: the number of the row, from 0
    reasons: tuple[str, ...] = ()  # they tell why a row has no image


def choose_columns(schema: Any, place: str, image: str | None, caption: str | None) -> Columns:
    """Choose the given columns, else those with usual names, else the one that contains images. `schema` is Arrow's."""
    kinds = {name: _kind(schema.field(name).type) for name in schema.names}
    columns = ", ".join(schema.names)
    for flag, name in (("image_column", image), ("caption_column", caption)):
        if name is not None and name not in kinds:
            raise UserError(f"--{flag} {name}: --source {place} has no such column; it has {columns}")
    if image is None:
        images = [name for name in schema.names if kinds[name] == "image"]
        paths = [name for name in schema.names if kinds[name] == "text"]
        image = usual_name(images, IMAGE_COLUMNS) or next(iter(images), None) or usual_name(paths, IMAGE_COLUMNS)
    if caption is None:
        caption = usual_name([name for name in schema.names if kinds[name] in ("text", "texts")], CAPTION_COLUMNS)
    if image is None:
        if {"key", "status"} <= kinds.keys():
            raise UserError(
                f"--source {place}: is img2dataset's table of results, without the images; give its folder, or the .tar"
                " files in it"
            )
        hint = hint_of_urls(schema.names) or "name one with --image_column"
        raise UserError(f"--source {place}: no column contains images; {hint}; it has {columns}")
    if caption is None:
        raise UserError(
            f"--source {place}: no column contains captions; name one with --caption_column; it has {columns}"
        )
    if kinds[image] not in ("image", "text"):
        raise UserError(f"--image_column {image}: contains {schema.field(image).type} in --source {place}, not images")
    if kinds[caption] not in ("text", "texts"):
        raise UserError(
            f"--caption_column {caption}: must contain a string or a list of strings in each row; in --source {place}"
            f" it contains {schema.field(caption).type}"
        )
    id = next((name for name in ID_COLUMNS if name in kinds), None)
    reasons = tuple(name for name in REASONS if name in kinds and name not in (image, caption))
    return Columns(image, caption, id, reasons if "status" in reasons else ())


def _kind(type: Any) -> str:
    """The kind of an Arrow type: `image` (bytes, or a struct with bytes), `text`, `texts` or `other`."""
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    if types.is_string(type) or types.is_large_string(type) or types.is_string_view(type):
        return "text"
    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        return "texts" if _kind(type.value_type) == "text" else "other"
    if types.is_struct(type):
        fields = {field.name: field.type for field in type}
        return "image" if "bytes" in fields and _kind(fields["bytes"]) == "image" else "other"
    binary = types.is_binary(type) or types.is_large_binary(type) or types.is_fixed_size_binary(type)
    return "image" if binary or types.is_binary_view(type) else "other"


@dataclass(frozen=True)
class TableRows:
    """Converts rows to pairs."""

    place: str
    columns: Columns
    folder: Path | None  # that paths of images are relative to; None: the Hub, where paths may be URLs

    def all_columns(self) -> tuple[str, ...]:
        return (self.columns.image, *self.text_columns(), *self.columns.reasons)

    def text_columns(self) -> tuple[str, ...]:
        names = (self.columns.caption, self.columns.id)
        return tuple(name for name in dict.fromkeys(names) if name is not None and name != self.columns.image)

    def id(self, row: TableRow, index: int) -> str:
        value = row[self.columns.id] if self.columns.id else None
        return str(index) if value is None else str(value)

    def captions(self, row: TableRow, index: int) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
        id, where = self.id(row, index), f"{self.place}, row {index}"
        return clean_captions(caption_values(row, (self.columns.caption,), id, where), id, where)

    def pair(self, row: TableRow, index: int) -> Pair:
        id, where = self.id(row, index), f"{self.place}, row {index}"
        captions, problems = self.captions(row, index)
        return Pair(id, self._image(row, id, where), captions, problems)

    def _image(self, row: TableRow, id: str, where: str) -> Image.Image:
        value = row[self.columns.image]
        path = None
        if isinstance(value, dict):
            value, path = value["bytes"], value.get("path")
        elif isinstance(value, str):
            value, path = None, value
        if value is None and path:
            value, where = self._read(path, id, where), f"{where}, {path}"
        if value is None:
            why = reason({name: row[name] for name in self.columns.reasons})
            message = f"{where}: {id} has no image" + (f" ({why})" if why else "")
            raise PairError(Problem(id, "missing image", message))
        return decode_image(value, id, where)

    def _read(self, path: str, id: str, where: str) -> bytes:
        import fsspec

        try:
            if self.folder is not None:
                return (self.folder / path).read_bytes()  # a URL is not downloaded: it is no file here
            with fsspec.open(path, "rb") as file:
                return file.read()
        except OSError as error:
            reason = error.strerror or error
            raise PairError(Problem(id, "missing image", f"{where}: {path} cannot be read ({reason})")) from None


class Table(Protocol):
    """A table with random access. Picklable: holds no open files."""

    def __len__(self) -> int: ...
    def schema(self) -> Any: ...
    def row(self, index: int, columns: tuple[str, ...]) -> TableRow: ...
    def column(self, name: str) -> Iterator[Any]: ...
    def index_sha256(self) -> str | None: ...


class StreamedTable(Protocol):
    """A table that is read in order. Picklable: holds no open files."""

    def schema(self) -> Any: ...
    def rows(self, columns: tuple[str, ...], start: int) -> Iterator[Callable[[], TableRow]]:
        """The rows from `start` on. Calling one reads it."""
        ...


class TableSource(RandomAccessSource):
    """The pairs of a table with random access."""

    def __init__(self, table: Table, rows: TableRows):
        self._table, self._rows = table, rows
        self._problems = dict[int, Problem]()
        if not len(table):
            raise UserError(f"--source {rows.place}: has no rows")
        if rows.columns.id:
            name, ids = rows.columns.id, PlaceList()
            for index, value in enumerate(table.column(name)):
                ids.add_key(rows.id({name: value}, index))
            for index in np.flatnonzero(~first_of_each(number_equal(*ids.keys()))).tolist():
                id = rows.id(table.row(index, (name,)), index)
                message = f"{rows.place}, row {index}: {name} {id} appears a second time"
                self._problems[index] = Problem(id, "duplicate id", message)

    def __len__(self) -> int:
        return len(self._table)

    def problems(self) -> list[Problem]:
        return list(self._problems.values())

    def image_files(self) -> Iterator[Path]:
        place = Path(self._rows.place)
        if place.is_dir():
            return (place / name for name in list_files(place).files)
        return iter([place] if place.is_file() else [])

    def index_sha256(self) -> str | None:
        return self._table.index_sha256()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._rows.captions(self._row(index, self._rows.text_columns()), index)[0]

    def __getitem__(self, index: int) -> Pair:
        return self._rows.pair(self._row(index, self._rows.all_columns()), index)

    def _row(self, index: int, columns: tuple[str, ...]) -> TableRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index in self._problems:
            raise PairError(self._problems[index])
        return self._table.row(index, columns)


class TableStream(Source):
    """The pairs of a table that is read in order. Repeated ids are not detected: that needs all ids in memory."""

    def __init__(self, table: StreamedTable, rows: TableRows):
        self._table, self._rows = table, rows

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        for index, row in enumerate(self._table.rows(self._rows.all_columns(), start), start):
            if not wanted(index):
                yield index, None
                continue
            try:
                yield index, self._rows.pair(row(), index)
            except PairError as error:
                yield index, error

    def all_captions(self) -> Iterator[str]:
        for index, row in enumerate(self._table.rows(self._rows.text_columns(), 0)):
            try:
                yield from self._rows.captions(row(), index)[0]
            except PairError:
                continue
