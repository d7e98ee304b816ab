"""Tables that img2dataset writes beside its images: a row for each URL, also for those that gave no image."""

from collections.abc import Collection
from pathlib import Path

from uvit.sources.decode import usual_name
from uvit.sources.types import Problem

REASONS = ("status", "error_message", "url")  # columns that tell why a row has no image
URLS = ("url", "image_url", "image_link")  # columns of a list that img2dataset downloads


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


def hint_of_urls(names: Collection[str]) -> str | None:
    """What to do with a table that has a column of URLs instead of images."""
    if (url := usual_name(names, URLS)) is None:
        return None
    return f"{url} contains URLs, so download the images, for example with img2dataset, and give their folder"
