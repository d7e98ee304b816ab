"""Lists in parquet files: rows that name image files. They are read in row groups."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from uvit.errors import UserError
from uvit.sources.decode import caption_values
from uvit.sources.files import ListRow
from uvit.sources.names import safe_name
from uvit.sources.places import Place, check_state, state_of
from uvit.sources.tables import choose_columns
from uvit.sources.types import PairError, Problem

BATCH = 8192  # rows that are converted at a time


class ParquetRows:
    """The place of a row is its number, from 0."""

    def __init__(self, path: Path, image_column: str | None, caption_column: str | None):
        file = _open(path)
        columns = choose_columns(file.schema_arrow, str(path), image_column, caption_column)
        self._path, self._image, self._caption = path, columns.image, columns.caption
        self._state = state_of(path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self._firsts = np.cumsum([0, *sizes])

    def where(self, number: int) -> str:
        return f"{self._path}, row {number}"

    def rows(self) -> Iterator[ListRow | Problem]:
        for number, (name, value) in enumerate(self._values(), start=1):
            if not isinstance(name, str) or not name:
                message = f"{self.where(number)}: names no image"
                yield Problem(f"{self._path.name}:{number}", "broken line", message)
                continue
            try:
                yield ListRow(name, self._captions(value, name, number), number, number - 1, 0)
            except PairError as error:
                yield error.problem

    def read(self, places: list[Place]) -> list[tuple[str, list[str]]]:
        rows = []
        for number, _ in places:
            group = int(np.searchsorted(self._firsts, number, "right")) - 1
            names, values = _row_group(self._path, self._state, group, self._image, self._caption)
            name = names[number - self._firsts[group]].as_py()
            rows.append((name, self._captions(values[number - self._firsts[group]].as_py(), name, number + 1)))
        return rows

    def _captions(self, value: Any, name: str, number: int) -> list[str]:
        if isinstance(value, str):
            return [value]
        # A null is an absent caption.
        row = {self._image: name, self._caption: value or ""}
        return caption_values(row, (self._caption,), safe_name(name), self.where(number))

    def _values(self) -> Iterator[tuple[Any, Any]]:
        from pyarrow import ArrowException

        file, columns = _open(self._path), list(dict.fromkeys([self._image, self._caption]))
        try:
            for group in range(file.metadata.num_row_groups):  # a reader of all groups takes memory for each
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
                    yield from zip(
                        *(batch.column(name).to_pylist() for name in (self._image, self._caption)), strict=True
                    )
        except (OSError, ArrowException, UnicodeDecodeError) as error:
            raise _damaged(self._path, error) from None


@lru_cache(maxsize=4)  # the rows of an image may lie on both sides of a border
def _row_group(path: Path, state: tuple[int, int], group: int, image: str, caption: str) -> tuple[Any, Any]:
    """Two columns."""
    from pyarrow import ArrowException

    try:
        check_state(path, state)
        # The workers already use all cores.
        table = _open(path).read_row_group(group, columns=list(dict.fromkeys([image, caption])), use_threads=False)
    except (OSError, ArrowException) as error:
        raise _damaged(path, error) from None
    return table.column(image), table.column(caption)


def lists_paths(path: Path, image_column: str | None, caption_column: str | None) -> bool:
    """Whether a parquet table contains paths of images, not the images. Raises UserError for other tables."""
    schema = _open(path).schema_arrow
    column = choose_columns(schema, str(path), image_column, caption_column).image
    return "binary" not in str(schema.field(column).type)  # the type is text, bytes, or a struct with bytes


def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"--source {path}: reading parquet files needs pyarrow: pip install 'uvit[datasets]'") from None
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"--source {path}: is not a complete parquet file ({reason})")
