"""WebDataset tars. The members with the same name up to the first dot are a pair: an image and a .txt or .json.

Tars on disk are indexed by their headers, which gives random access, and joins the members of a pair wherever they lie
in the tar. Tars at a URL are read one after the other, each from beginning to end, so there they must be adjacent.
"""

import glob
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import groupby, takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from uvit.errors import UserError
from uvit.sources.decode import (
    CAPTION_COLUMNS,
    caption_values,
    clean_captions,
    decode_image,
    decode_object,
    decode_text,
)
from uvit.sources.img2dataset import failed_rows
from uvit.sources.names import image_suffixes, say_not_read
from uvit.sources.remote import RemoteFile, check_protocol, is_remote
from uvit.sources.tar_format import Bytes, Member, members
from uvit.sources.types import Pair, PairError, Problem, RandomAccessSource, Source, digest_of

TEXTS = ("txt", "json")  # suffixes of captions; the first goes before the second
INCOMPLETE = ("missing image", "no caption")  # what is wrong with a pair before its other members are found


def open_tars(places: list[str]) -> Source:
    """Open tars, in order. Raises UserError if one is not a tar, or if all are empty."""
    places = [tar for place in places for tar in expand(place)]
    for place, times in Counter(places).items():
        if times > 1:
            raise UserError(f"--source {place}: is given twice; remove one")
    if not any(is_remote(place) for place in places):
        return TarSource([Path(place) for place in places])
    for place in filter(is_remote, places):
        check_protocol(place)
    return TarStream(places)


def is_tar(name: str) -> bool:
    """Whether a name is that of a tar, perhaps a compressed one."""
    return re.search(r"\.(tar|tar\.\w+|tgz|tbz2?|txz|tzst)$", name, re.IGNORECASE) is not None


def expand(place: str) -> list[str]:
    """Expand braces, {000..099} or {a,b}, and the wildcards * ? []. In URLs, only braces are expanded."""
    if Path(place).exists():
        return [place]
    patterns = _braces(place)
    if is_remote(place):
        if "*" in place:
            raise UserError(f"--source {place}: * does not work in a URL; write a range, such as {{000..099}}")
        return patterns
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern]
        if re.search(r"[*?[]", pattern) and not Path(pattern).exists():  # of a folder with brackets in its name
            # Path.glob would also find hidden files, which may be incomplete.
            matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not matches:
            raise UserError(f"--source {place}: there is no file {pattern}")
        found += matches
    return found


def _braces(text: str) -> list[str]:
    """Expand braces as a shell does, but not nested ones."""
    for match in re.finditer(r"\{([^{}]*)\}", text):
        if ends := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
            first, last = int(ends[1]), int(ends[2])
            padded = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
            width = max(map(len, ends.groups())) if padded else 0
            step = 1 if last >= first else -1
            choices = [f"{number:0{width}}" for number in range(first, last + step, step)]
        elif "," in match[1]:
            choices = match[1].split(",")
        else:
            continue
        rests = _braces(text[match.end() :])
        return [text[: match.start()] + choice + rest for choice in choices for rest in rests]
    return [text]


# Pairs


def _groups(found: Iterator[Member]) -> Iterator[tuple[str, Iterator[Member]]]:
    """(key, members) of adjacent members with one key. A second member of one name begins another group."""
    number, key, suffixes = 0, "", set[str]()

    def group_of(member: Member) -> tuple[int, str]:
        nonlocal number, key
        if member.key != key or (member.suffix in suffixes and not member.cut):
            number, key = number + 1, member.key
            suffixes.clear()
        suffixes.add(member.suffix)
        return number, key

    for (_, key_of_group), group in groupby(found, key=group_of):
        yield key_of_group, group


def _parts(found: Collection[Member], id: str, place: object) -> tuple[Member, Member] | Problem:
    """-> (image, captions)"""
    images = [member for member in found if member.suffix in image_suffixes()]
    texts = [member for suffix in TEXTS for member in found if member.suffix == suffix]
    suffixes = ", ".join(f".{member.suffix}" for member in found if member.suffix)
    if any(member.cut for member in found):
        return Problem(id, "cut off", f"{place}: is truncated or damaged in {id}; the pairs after it are lost")
    if not images:
        return Problem(id, "missing image", f"{place}: {id} needs an image, such as .jpg or .png, but has {suffixes}")
    if len(images) > 1:
        return Problem(id, "several images", f"{place}: {id} must have one image, but has {suffixes}")
    if not texts:
        return Problem(id, "no caption", f"{place}: {id} needs a .txt or .json of captions, but has {suffixes}")
    return images[0], texts[0]


def _repeated(found: Collection[Member], id: str, place: object) -> Problem:
    """The problem of members that repeat those of an earlier pair."""
    parts = _parts(found, id, place)
    if isinstance(parts, Problem) and parts.kind == "cut off":
        return parts
    return Problem(id, "duplicate id", f"{place}: {id} appears a second time")


def _suffixes(found: Collection[Member]) -> set[str]:
    return {member.suffix for member in found}


def _captions(data: bytes, suffix: str, id: str, place: object) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    where = f"{place}, {id}.{suffix}"
    text = decode_text(data, id, where)
    values = [text] if suffix == "txt" else caption_values(decode_object(text, id, where), CAPTION_COLUMNS, id, where)
    return clean_captions(values, id, where)


def _prefixes(places: list[str]) -> list[str]:
    """The prefix of the keys of each tar: empty for a single tar, else the part of its path that is not shared."""
    if len(places) == 1:
        return [""]
    paths = [PurePosixPath(urlsplit(place).path if is_remote(place) else place).with_suffix("") for place in places]
    if len(set(paths)) < len(paths):  # URLs may differ elsewhere
        return [f"{number}/" for number in range(len(paths))]
    shared = len(
        list(takewhile(lambda parts: len(set(parts)) == 1, zip(*(path.parts for path in paths), strict=False)))
    )
    return ["/".join(path.parts[shared:]) + "/" for path in paths]


# On disk


class TarSource(RandomAccessSource):
    """Pairs in tars on disk. The index is compact, as there may be millions of pairs."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._prefixes = _prefixes([str(path) for path in paths])
        self._firsts = array("q")  # row of each tar's first pair
        self._keys = bytearray()  # one after the other, UTF-8
        self._key_ends = array("q")
        self._spans = array("q")  # offset and size of the image, of the captions; zeros for a problem
        self._is_json = bytearray()
        self._problems: dict[int, Problem] = {}
        for path, prefix in zip(paths, self._prefixes, strict=True):
            self._firsts.append(len(self))
            try:
                with path.open("rb") as file:
                    self._add(members(file, path), path, prefix)
            except OSError as error:
                raise _unreadable(path, error) from None
        if not len(self):
            raise UserError(
                f"--source {paths[0]}: contains no pairs" + (", nor do the others" if len(paths) > 1 else "")
            )

    def _add(self, found: Iterator[Member], path: Path, prefix: str) -> None:
        """Index a tar. A pair that is not yet complete waits for its other members until the end of the tar."""
        rows, waiting, others = dict[str, int](), dict[int, list[Member]](), list[str]()

        def of_pairs() -> Iterator[Member]:
            for member in found:
                if member.key:
                    yield member
                else:
                    others.append(member.suffix)

        for key, group in _groups(of_pairs()):
            members, row = list(group), rows.get(key)
            if row is None:
                row = rows[key] = self._new_row(key)
                waiting[row] = []
            before = waiting.get(row)
            if before is None and self._completes(row, members):
                continue
            if before is None or not _suffixes(before).isdisjoint(_suffixes(members)):
                self._problems[self._new_row(key)] = _repeated(members, prefix + key, path)
                continue
            before += members
            parts = _parts(before, prefix + key, path)
            if not isinstance(parts, Problem) or parts.kind not in INCOMPLETE:
                self._set(row, parts)
                del waiting[row]
        for row, incomplete in waiting.items():
            self._set(row, _parts(incomplete, prefix + incomplete[0].key, path))
        table = path.with_suffix(".parquet")  # of img2dataset, or another one
        failed = failed_rows(table, prefix)
        for problem in failed or ():
            self._problems[self._new_row("")] = problem
        say_not_read(path, others)
        if failed is None and table.is_file():
            say_not_read(path.parent, [table.name])

    def _new_row(self, key: str) -> int:
        self._keys += key.encode()
        self._key_ends.append(len(self._keys))
        self._spans.extend((0, 0, 0, 0))
        self._is_json.append(False)
        return len(self) - 1

    def _set(self, row: int, parts: tuple[Member, Member] | Problem) -> None:
        if isinstance(parts, Problem):
            self._problems[row] = parts
            return
        image, text = parts
        self._spans[4 * row : 4 * row + 4] = array("q", (image.offset, image.size, text.offset, text.size))
        self._is_json[row] = text.suffix == "json"

    def _completes(self, row: int, members: list[Member]) -> bool:
        """Whether these members of a pair that has its parts can belong to it too. False: they repeat a part of it."""
        suffixes = _suffixes(members)
        if any(member.cut for member in members) or suffixes & image_suffixes():
            return False
        if row in self._problems:
            return True
        texts = [member for member in members if member.suffix in TEXTS[: 1 + self._is_json[row]]]
        if texts and self._is_json[row] and texts[0].suffix == "txt":  # a .txt goes before a .json
            self._spans[4 * row + 2 : 4 * row + 4] = array("q", (texts[0].offset, texts[0].size))
            self._is_json[row] = False
            return True
        return not texts

    def __len__(self) -> int:
        return len(self._key_ends)

    def problems(self) -> list[Problem]:
        return list(self._problems.values())

    def image_files(self) -> Iterator[Path]:
        return iter(self.paths)

    def index_sha256(self) -> str | None:
        return digest_of((bytes(self._keys), self._key_ends.tobytes(), self._spans.tobytes()))

    def captions(self, index: int) -> tuple[str, ...]:
        id, path, _, text = self._row(index)
        return _captions(self._read(path, *text), self._suffix(index), id, path)[0]

    def __getitem__(self, index: int) -> Pair:
        id, path, image, text = self._row(index)
        captions, problems = _captions(self._read(path, *text), self._suffix(index), id, path)
        return Pair(id, decode_image(self._read(path, *image), id, path), captions, problems)

    def _row(self, index: int) -> tuple[str, Path, tuple[int, int], tuple[int, int]]:
        """-> (id, tar, offset and size of the image, of the captions)"""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index in self._problems:
            raise PairError(self._problems[index])
        tar = bisect_right(self._firsts, index) - 1
        start = self._key_ends[index - 1] if index else 0
        key = self._keys[start : self._key_ends[index]].decode()
        a, b, c, d = self._spans[4 * index : 4 * index + 4]
        return self._prefixes[tar] + key, self.paths[tar], (a, b), (c, d)

    def _suffix(self, index: int) -> str:
        return "json" if self._is_json[index] else "txt"

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:  # not a problem of this pair alone: the disk is gone
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"--source {path}: cannot be read ({error.strerror})")


# At a URL


class TarStream(Source):
    """Pairs in tars of which at least one is at a URL. Each tar is read once, from its beginning."""

    def __init__(self, places: list[str]):
        self.places = places

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        suffixes = {*image_suffixes(), *TEXTS}
        for position, row in enumerate(self._rows(lambda position: position >= start and wanted(position), suffixes)):
            if position < start:
                continue
            if row is None:
                yield position, None
                continue
            try:
                (image, text), id, place, contents = row.parts(), row.id, row.place, row.contents
                captions, problems = _captions(contents[text], text.suffix, id, place)
                yield position, Pair(id, decode_image(contents[image], id, place), captions, problems)
            except PairError as error:
                yield position, error

    def all_captions(self) -> Iterator[str]:
        for row in self._rows(lambda _: True, TEXTS):
            try:
                assert row is not None
                _, text = row.parts()
                yield from _captions(row.contents[text], text.suffix, row.id, row.place)[0]
            except PairError:
                continue

    def _rows(self, wanted: Callable[[int], bool], suffixes: Collection[str]) -> Iterator["_Row | None"]:
        """All pairs in order, with the contents of the members with those suffixes. None: not wanted."""
        position = 0
        for place, prefix in zip(self.places, _prefixes(self.places), strict=True):
            seen = set[str]()
            with closing(RemoteFile(place)) as file:
                for key, group in _groups(member for member in members(file, place) if member.key):
                    again = key in seen
                    seen.add(key)
                    row = None
                    if wanted(position):
                        row = _Row(prefix + key, place, again, {})
                        for member in group:  # one at a time: a stream cannot go back to earlier contents
                            row.add(file, member, member.suffix in suffixes)
                    position += 1
                    yield row


class _Row(NamedTuple):
    """The members of a pair that were read."""

    id: str
    place: str
    again: bool  # this id appeared earlier in the tar
    contents: dict[Member, bytes]  # of all members; empty where not wanted

    def add(self, file: Bytes, member: Member, wanted: bool) -> None:
        data = b""
        if wanted:
            file.seek(member.offset)
            data = file.read(member.size)
        self.contents[member] = data

    def parts(self) -> tuple[Member, Member]:
        """-> (image, captions). Raises PairError."""
        parts = _parts(self.contents, self.id, self.place)
        if not isinstance(parts, Problem) and self.again:
            parts = _repeated(self.contents, self.id, self.place)
        if isinstance(parts, Problem):
            if parts.kind in INCOMPLETE:
                message = f"{parts.message}; in a tar at a URL, the members of a pair must be adjacent"
                parts = replace(parts, message=message)
            raise PairError(parts)
        return parts
