"""Find the members of a tar file, and their offsets."""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from uvit.errors import UserError
from uvit.sources.names import is_clutter

TAR_BLOCK = 512  # bytes; headers and contents of a tar start at multiples of it
EXTENSIONS = (b"x", b"L", b"K")  # describe the member that follows: pax headers; GNU long names and long link names
FILES, LINKS = (b"0", b"\0", b"7"), (b"1", b"2")  # the others are folders, devices, ...
TAR_END = bytes(TAR_BLOCK)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Member(NamedTuple):
    """A file in a tar."""

    key: str  # of its pair; empty if it cannot belong to one: a hidden file, one of an operating system, or no suffix
    suffix: str  # what follows the key, lower case, without the first dot; the whole name if there is no key
    offset: int  # of its content, bytes
    size: int  # bytes
    cut: bool = False  # not a member: the tar is truncated in the one before, or unreadable after it


class Bytes(Protocol):
    def seek(self, position: int, /) -> object: ...
    def read(self, size: int, /) -> bytes: ...


def members(file: Bytes, place: object) -> Iterator[Member]:
    """The files of a tar, in order. If it is truncated, the last member has the last key and `cut`.

    A link has no content of its own here, so its suffix is none of an image or a caption.

    This reads the headers itself: tarfile takes four times as long, which is minutes for millions of pairs.
    """
    key, named, position = "", dict[bytes, bytes](), 0
    while True:
        file.seek(position)
        header = file.read(TAR_BLOCK)
        if header == TAR_END or (position == 0 and not header):
            return
        if position == 0 and header.startswith(COMPRESSED):
            raise UserError(
                f"--source {place}: is compressed, so no pair can be read without all before it; decompress it"
            )
        try:
            size = _checked_size(header)
            kind = header[156:157]
            content = position + TAR_BLOCK
            if kind in EXTENSIONS:
                if size > 2**20:
                    raise ValueError
                if kind == b"x":
                    named |= _pax_fields(file.read(size))
                elif kind == b"L":
                    named |= {b"path": file.read(size).rstrip(b"\0")}
            else:
                size = _in_range(int(named.get(b"size", size)))
        except ValueError:
            if not key:
                raise UserError(f"--source {place}: is not a tar file, or is damaged at byte {position:,}") from None
            yield Member(key, "", position, 0, cut=True)
            return
        position = content + -(-size // TAR_BLOCK) * TAR_BLOCK
        if kind in EXTENSIONS:
            continue
        name = named.get(b"path") or _name(header)
        named = {}
        if kind not in FILES + LINKS:
            continue
        path = re.sub(r"^(\./+)+", "", name.decode(errors="backslashreplace"))
        folder, _, base = path.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot or any(map(is_clutter, path.split("/"))):
            yield Member("", path, content, size)
            continue
        key = f"{folder}/{stem}" if folder else stem
        yield Member(key, suffix.lower() + (" (a link)" if kind in LINKS else ""), content, size)


def _checked_size(header: bytes) -> int:
    """Raises ValueError if this is not a valid header."""
    if len(header) < TAR_BLOCK:
        raise ValueError
    # The checksum is the sum of all bytes with its own field as spaces. Adler-32 holds that sum, plus one.
    summed = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    if summed != (_number(header[148:156]) + 1) % 65521:
        raise ValueError
    return _number(header[124:136])


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return _in_range(int.from_bytes(field[1:], "big"))
    return _in_range(int(field.strip(b" \0") or b"0", 8))


def _in_range(number: int) -> int:
    """Check that a file can be sought to this position. Raises ValueError."""
    if not 0 <= number < 2**60:
        raise ValueError
    return number


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    """Records of the form `LENGTH NAME=VALUE\\n`, the length being that of the whole record."""
    fields = {}
    while data:
        digits, _, rest = data.partition(b" ")
        end = int(digits) - len(digits) - 1
        if not 0 < end <= len(rest):
            raise ValueError
        name, _, value = rest[: end - 1].partition(b"=")
        fields[name] = value
        data = rest[end:]
    return fields
