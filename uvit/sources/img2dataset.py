"""Tables that img2dataset writes beside its images: a row for each URL, also for those that gave no image."""

from pathlib import Path

from uvit.sources.types import Problem

REASONS = ("status", "error_message", "url")  # columns that tell why a row has no image


def failed_rows(path: Path, prefix: str = "") -> list[Problem] | None:
    """A problem for each row without an image. None: this is no such table, or pyarrow is not installed.

    `prefix` comes before the keys.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        return None
    problems = []
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not {"key", "status"} <= set(names):
                return None
            number = 0
            for batch in file.iter_batches(columns=["key", *(name for name in REASONS if name in names)]):
                for row in batch.to_pylist():
                    number += 1
                    if row["status"] != "success":
                        id = f"{prefix}{row['key']}"
                        message = f"{path}, row {number}: {id} has no image ({reason(row)})"
                        problems.append(Problem(id, "missing image", message))
    except (OSError, ArrowException, UnicodeDecodeError):
        return None
    return problems


def reason(row: dict[str, object]) -> str:
    """Why a row has no image. Empty if it does not say."""
    return " ".join(": ".join(str(row[name]) for name in REASONS if row.get(name)).split())
