"""Read the lists in a JSON object entry by entry, with the place of each entry in the file."""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from uvit.sources.places import codec_of, num_bytes

WINDOW = 2**20  # bytes that are decoded at a time

Entry = tuple[str, Any, int, int]  # (key of the list, entry, its first byte, number of bytes)

_AFTER = tuple(" \t\n\r,:]}")  # what may follow a value
_space = re.compile(r"[ \t\n\r]*")
_parse = json.JSONDecoder().raw_decode


class UnusualError(ValueError):
    """The file is not valid, or not an object that has each of the lists once."""


def read_entries(file: BinaryIO, keys: Collection[str]) -> Iterator[Entry]:
    """The entries of the lists with these keys, in the order of the file. Raises ValueError, also UnusualError."""
    text = _Window(file)
    found = []
    text.expect("{")
    if text.next() == "}":
        text.expect("}")
    else:
        separator = ","
        while separator == ",":
            if text.next() != '"':
                raise UnusualError("needs a key")
            key = text.value()[0]
            text.expect(":")
            if key in keys:
                found.append(key)
                for entry in text.entries():
                    yield (key, *entry)
            else:
                text.value()
            separator = text.expect(",}")
    if text.next() or sorted(found) != sorted(keys):
        raise UnusualError("is not one object with each list once")


class _Window:
    """A part of the file's text, from which values are parsed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        head = file.read(WINDOW)
        self._codec, self._place = codec_of(json.detect_encoding(head), head)  # of the first character not yet parsed
        self._decoder = codecs.getincrementaldecoder(self._codec)("surrogatepass")
        self._text, self._at = "", 0
        self._set(self._decoder.decode(head[self._place :]))

    def next(self) -> str:
        """The next character that is not a space. Empty at the end of the file."""
        while True:
            end = _space.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._place += self._num_bytes(end)
            self._at = end
            if end < len(self._text):
                return self._text[end]
            if not self._read_more():
                return ""

    def expect(self, characters: str) -> str:
        """The next character, which must be one of these."""
        found = self.next()
        if not found or found not in characters:
            raise UnusualError(f"needs one of {characters}")
        self._place += self._num_bytes(self._at + 1)
        self._at += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """(the next value, its first byte, number of bytes)"""
        self.next()
        while True:
            try:
                value, end = _parse(self._text, self._at)
            except ValueError:
                if not self._read_more():
                    raise
                continue
            if self._text[end : end + 1] not in _AFTER and self._read_more():  # a number goes on, as -1 does in -1.5
                continue
            start, length = self._place, self._num_bytes(end)
            self._place += length
            self._at = end
            return value, start, length

    def entries(self) -> Iterator[tuple[Any, int, int]]:
        self.expect("[")
        if self.next() == "]":
            self.expect("]")
            return
        separator = ","
        while separator == ",":
            yield self.value()
            separator = self.expect(",]")

    def _num_bytes(self, end: int) -> int:
        """Of the text from here to `end`."""
        if self._is_ascii:
            return end - self._at
        return num_bytes(self._text[self._at : end], self._codec, "surrogatepass")

    def _set(self, text: str) -> None:
        self._text, self._at = text, 0
        self._is_ascii = self._codec == "utf-8" and text.isascii()

    def _read_more(self) -> bool:
        """Whether there was more."""
        rest = self._text[self._at :]
        data = self._file.read(max(WINDOW, len(rest)))  # twice as much, so that a long value is not parsed often
        more = self._decoder.decode(data, final=not data)
        self._set(rest + more)
        return bool(data)
