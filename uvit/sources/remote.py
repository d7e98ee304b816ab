"""Read files behind a URL, with any protocol that fsspec supports."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from uvit.errors import UserError

T = TypeVar("T")

TRY_AGAIN_AFTER = (1.0, 2.0, 4.0)  # seconds


def is_remote(place: str) -> bool:
    return "://" in place


def check_protocol(url: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except (
        ImportError,
        ValueError,
    ) as error:  # fsspec says which package to install, or that it does not know the protocol
        raise UserError(f"--source {url}: cannot be read here ({error})") from None


class RemoteFile:
    """A file behind a URL, read forwards. Reads are retried if the network fails."""

    def __init__(self, url: str):
        self.url = url
        self.position = 0
        self._file: Any = None
        self._options: dict[str, int] = {}

    def seek(self, position: int) -> None:
        self.position = position

    def read(self, size: int) -> bytes:
        """Fewer bytes only at the end."""
        data = self._retrying(lambda: self._read(size))
        self.position += len(data)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> None:
        import fsspec

        self._file = fsspec.open(self.url, "rb", **self._options).open()

    def _read(self, size: int) -> bytes:
        try:
            return self._read_on(size)
        except ValueError:
            if self._options or not self.url.startswith("http"):
                raise
            self._options = {"block_size": 0}  # the server does not support range requests: stream the whole file
            self.close()
            return self._read_on(size)

    def _read_on(self, size: int) -> bytes:
        if self._file is None:
            self._open()
        if self._options:
            while self._file.tell() < self.position:
                if not self._file.read(min(self.position - self._file.tell(), 2**20)):
                    return b""
        else:
            self._file.seek(self.position)
        parts = []
        while size and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _retrying(self, action: Callable[[], T]) -> T:
        for wait in (*TRY_AGAIN_AFTER, None):
            try:
                return action()
            except Exception as error:  # of whichever library implements the protocol
                self.close()
                cause = error.__cause__ or error  # fsspec's http reports every failure as a missing file
                is_final = isinstance(cause, FileNotFoundError | PermissionError)
                if wait is None or is_final or 400 <= getattr(cause, "status", 0) < 500:
                    reason = " ".join(str(cause).split()) or type(cause).__name__
                    raise UserError(f"--source {self.url}: cannot be read ({reason})") from None
                time.sleep(wait)
        raise AssertionError
