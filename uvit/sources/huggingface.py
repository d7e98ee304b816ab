"""Hugging Face data sets: folders that `save_to_disk` wrote, parquet files that contain images, and the Hub.

Parquet files are read directly: the `datasets` library would first write a copy of them into its cache.
"""

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from uvit.errors import UserError
from uvit.sources.names import split_of
from uvit.sources.tables import Table, TableRow, TableRows, TableSource, TableStream, choose_columns
from uvit.sources.types import Source, digest_of

STREAM_BATCH = 32  # rows read at a time


def is_dataset(path: Path) -> bool:
    """Whether this is a folder that `save_to_disk` wrote, a folder with parquet files, or a parquet file."""
    if path.is_file():
        return path.suffix.lower() == ".parquet"
    return is_saved(path) or any(
        next(path.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    )


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_dataset(
    place: str,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Source:
    """Open a folder, a parquet file, or hf:USER/NAME or hf:USER/NAME:CONFIG on the Hub.

    Raises UserError if it cannot be opened, or lacks the split or a column.
    """
    if place.startswith("hf:"):
        opened = _open_hub(place, split, streaming)
        folder = None
    else:
        path = Path(place)
        opened = _open_folder(path, split, streaming)
        folder = path if path.is_dir() else path.parent
    columns = choose_columns(opened.schema(), place, image_column, caption_column)
    rows = TableRows(place, columns, folder)
    return TableStream(opened, rows) if isinstance(opened, _Streamed) else TableSource(opened, rows)


# Parquet files


class _Parquet:
    """Rows of parquet files. They are read in row groups; each process keeps the last one in memory."""

    def __init__(self, files: Sequence[Path]):
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(
                f"--source {files[0]}: reading parquet files needs pyarrow: pip install 'uvit[datasets]'"
            ) from None
        self._groups = list[tuple[Path, int]]()
        self._firsts = array("q")  # first row of each group
        self._num_rows = 0
        columns: list[str] | None = None
        for path in files:
            try:
                with ParquetFile(path) as file:
                    names, sizes = file.schema_arrow.names, file.metadata
            except (OSError, ArrowException) as error:
                raise UserError(f"--source {path}: is not a complete parquet file ({_in_a_line(error)})") from None
            if columns is not None and set(names) != set(columns):
                raise UserError(
                    f"--source {path}: has the columns {', '.join(names)}, but {files[0].name} has {', '.join(columns)}"
                )
            columns = names
            for group in range(sizes.num_row_groups):
                self._groups.append((path, group))
                self._firsts.append(self._num_rows)
                self._num_rows += sizes.row_group(group).num_rows
        self._first_file = files[0]

    def __len__(self) -> int:
        return self._num_rows

    def schema(self) -> Any:
        from pyarrow.parquet import read_schema

        return read_schema(self._first_file)

    def row(self, index: int, columns: tuple[str, ...]) -> TableRow:
        group = bisect_right(self._firsts, index) - 1
        return _row_of(_row_group(*self._groups[group], columns), index - self._firsts[group])

    def index_sha256(self) -> str | None:
        """Of the names and sizes of the files."""
        files = dict.fromkeys(path for path, _ in self._groups)
        return digest_of(f"{path.name}\0{path.stat().st_size}".encode(errors="surrogateescape") for path in files)

    def column(self, name: str) -> Iterator[Any]:
        for path, group in self._groups:
            yield from _row_group(path, group, (name,))[name].to_pylist()


@lru_cache(maxsize=2)  # one for whole pairs, one for captions alone
def _row_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    """A pyarrow.Table."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            # The workers already use all cores.
            return file.read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, ArrowException) as error:
        raise UserError(f"--source {path}: cannot be read ({_in_a_line(error)})") from None


def _row_of(table: Any, index: int) -> TableRow:
    return {name: table.column(name)[index].as_py() for name in table.column_names}


def _parquet_files(path: Path, split: str) -> list[Path]:
    """The files of a split, which their names or folders tell. A single file also counts as `train`."""
    if path.is_file():
        if split != "train":
            _checked_split(split, [_split_of(Path(path.name))], path)
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        relative = file.relative_to(path)
        if not any(part.startswith(".") for part in relative.parts):
            found.setdefault(_split_of(relative), []).append(file)
    return found[_checked_split(split, sorted(found), path)]


def _split_of(file: Path) -> str:
    if numbered := re.match(r"(\w[\w.-]*)-\d{5}-of-\d{5}", file.name):
        return numbered[1]
    return split_of(str(file)) or "train"


def _checked_split(split: str, splits: Sequence[str], path: Path) -> str:
    if split not in splits:
        raise UserError(f"--split {split}: --source {path} has no such split; it has {', '.join(splits)}")
    return split


# With the library


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "--source: Hugging Face data sets need the `datasets` library: pip install 'uvit[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, so its log messages are not needed
    return datasets


def _load(where: str, *arguments: str | None, **options: Any) -> Any:
    """`load_dataset`. Raises UserError."""
    library = _library()
    try:
        return library.load_dataset(*arguments, **options)
    except Exception as error:  # from the network, the Hub, a file or the library
        raise UserError(f"--source {where}: cannot be opened ({_in_a_line(error)})") from None


class _Mapped:
    """A datasets.Dataset, memory-mapped."""

    def __init__(self, dataset: Any):
        self._dataset = dataset.with_format("arrow")  # images as the bytes of their files

    def __len__(self) -> int:
        return len(self._dataset)

    def index_sha256(self) -> str | None:
        return None

    def schema(self) -> Any:
        return self._dataset.features.arrow_schema

    def row(self, index: int, columns: tuple[str, ...]) -> TableRow:
        return _row_of(self._dataset[index].select(list(columns)), 0)

    def column(self, name: str) -> Iterator[Any]:
        for table in self._dataset.select_columns(name).iter(batch_size=10_000):
            yield from table.column(name).to_pylist()


class _Streamed:
    """A datasets.IterableDataset. Each process that reads it opens it again."""

    def __init__(self, place: str, open: Callable[[], Any]):
        self._place, self._open = place, open

    def schema(self) -> Any:
        features = self._open().features
        if features is not None:
            return features.arrow_schema
        first = next(self._tables(self._open()), None)
        if first is None:
            raise UserError(f"--source {self._place}: has no rows")
        return first.schema

    def rows(self, columns: tuple[str, ...], start: int) -> Iterator[Callable[[], TableRow]]:
        dataset = self._open().select_columns(list(columns))
        for table in self._tables(dataset.skip(start) if start else dataset):
            for index in range(table.num_rows):
                yield partial(_row_of, table, index)

    def _tables(self, dataset: Any) -> Iterator[Any]:
        try:
            # Not iter(dataset): in a worker process, that yields only some of the rows.
            yield from dataset.with_format("arrow").iter(batch_size=STREAM_BATCH)
        except Exception as error:  # from the network or a format; the type depends on the builder
            raise UserError(f"--source {self._place}: can no longer be read ({_in_a_line(error)})") from None


def _open_folder(path: Path, split: str, streaming: bool) -> "Table | _Streamed":
    saved = path / split if (path / "dataset_dict.json").is_file() else path
    if saved != path:
        _checked_split(split, _saved_splits(path / "dataset_dict.json"), path)
    if (saved / "state.json").is_file():
        dataset = _load_saved(saved)
        if saved == path and split != "train":
            _checked_split(split, [str(dataset.split or "train")], path)
        return _Streamed(str(path), partial(_stream_saved, saved)) if streaming else _Mapped(dataset)
    files = _parquet_files(path, split)
    if streaming:
        return _Streamed(str(path), partial(_stream_parquet, [str(file) for file in files]))
    return _Parquet(files)


def _saved_splits(path: Path) -> list[str]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--source {path}: lists no splits ({_in_a_line(error)})") from None


def _load_saved(path: Path) -> Any:
    try:
        return _library().load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--source {path}: cannot be opened ({_in_a_line(error)})") from None


def _stream_saved(path: Path) -> Any:
    return _load_saved(path).to_iterable_dataset()


def _stream_parquet(files: list[str]) -> Any:
    return _load(files[0], "parquet", data_files=files, split="train", streaming=True)


def _open_hub(place: str, split: str, streaming: bool) -> "Table | _Streamed":
    if streaming:
        return _Streamed(place, partial(_load_hub, place, split, True))
    return _Mapped(_load_hub(place, split, False))


def _load_hub(place: str, split: str, streaming: bool) -> Any:
    named = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?", place)
    if not named:
        raise UserError(f"--source {place}: must be hf:USER/NAME or hf:USER/NAME:CONFIG")
    return _load(f"{place}, --split {split}", named[1], named[2], split=split, streaming=streaming)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
