"""What the names of files say: which are images, which are clutter; and files of a folder at any depth."""

import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from uvit.sources.types import Problem

# Pillow opens them, but they are drawings, videos and measurements, or programs: for EPS it runs another program.
NOT_IMAGES = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
CLUTTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"}  # left by operating systems; names in lower case
NUM_NAMED = 5  # in a line that says which files are not read


@lru_cache
def image_formats() -> tuple[str, ...]:
    """All image formats that Pillow opens, and those of its plugins that are loaded, in the order in which it tries."""
    Image.init()  # loads Pillow's own plugins
    return tuple(name for name in Image.ID if name not in NOT_IMAGES)


@lru_cache
def image_suffixes() -> frozenset[str]:
    """Their suffixes, without a dot."""
    formats = {*image_formats(), "MPO"}  # Pillow opens MPO as JPEG
    return frozenset(suffix[1:].lower() for suffix, kind in Image.registered_extensions().items() if kind in formats)


def stem_of(name: str) -> str:
    """A path without its suffix."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "/" not in suffix else name


def suffix_of(name: str) -> str:
    """In lower case, without the dot. Empty if there is none."""
    _, dot, suffix = name.rpartition(".")
    return suffix.lower() if dot and "/" not in suffix else ""


def is_image(name: str) -> bool:
    return suffix_of(name) in image_suffixes()


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden, or left by an operating system."""
    return name.startswith(".") or name.lower() in CLUTTER


def safe_name(name: object) -> str:
    """A form of a name that can be printed and stored as UTF-8, whatever its bytes."""
    return str(name).encode(errors="backslashreplace").decode()


def is_file(path: Path) -> bool:
    """Whether there is such a file. None can have a name that is too long, for which Path.is_file raises an error."""
    return os.path.isfile(path)  # noqa: PTH113


# Splits


SPLITS = ("train", "val", "validation", "valid", "dev", "test", "heldout")  # names of files and folders


def split_of(name: str) -> str | None:
    """The split that a path names: its file's name first, then its folders, the inner ones first. None: it names none.

    A word of the name is a split: `my_val.tar`, `Train-0.parquet`, `testset.csv`, `captions_val2014.json`.
    """
    for part in reversed(stem_of(name).split("/")):
        for word in re.findall("[a-z]+", part.lower()):
            if (found := word.removesuffix("set")) in SPLITS:
                return found
    return None


def names_split(name: str, split: str) -> bool:
    """Whether the name of a file names this split, such as val, or val2014."""
    return split_of(name) == split or split.lower() in re.findall("[a-z0-9]+", stem_of(name).lower())


# Files


def name_on_disk(folder: Path, name: str) -> str:
    """The name of a file in `folder`: an accented letter may be one character there, or two (NFC, NFD)."""
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")} - {name}
    if not forms or is_file(folder / name):
        return name
    return next((form for form in sorted(forms) if is_file(folder / form)), name)


def some_of(names: Collection[str]) -> str:
    """`a, b and 3 more`, in one line."""
    shown = ", ".join(" ".join(safe_name(name).split()) for name in list(names)[:NUM_NAMED])
    return shown + (f" and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else "")


def say_not_read(place: object, names: Collection[str]) -> None:
    """Print a line, so that no file disappears without one."""
    if names:
        print(f"Not read in {safe_name(place)}: {some_of(names)}.")


@dataclass(frozen=True)
class Listing:
    """The files of a folder at any depth, as paths relative to it, in order."""

    folder: Path
    files: list[str] = field(default_factory=list)
    clutter: list[str] = field(default_factory=list)  # hidden files and folders, and those of operating systems
    problems: list[Problem] = field(default_factory=list)  # folders that cannot be read

    def top(self, *suffixes: str) -> list[str]:
        """The files in the folder itself that have one of these suffixes."""
        return [name for name in self.files if "/" not in name and suffix_of(name) in suffixes]

    def without_splits(self) -> "Listing":
        """Without the folders of splits in it; they count as not read."""
        first = {name: name.partition("/")[0] for name in self.files if "/" in name}
        inside = {name: folder for name, folder in first.items() if folder in SPLITS}
        files = [name for name in self.files if name not in inside]
        return replace(self, files=files, clutter=[*self.clutter, *sorted({f"{each}/" for each in inside.values()})])

    def unread(self, used: Iterable[str]) -> list[str]:
        return [*sorted(set(self.files).difference(used)), *self.clutter]


def list_files(folder: Path) -> Listing:
    """Links to files count as files. Links to folders are followed, each folder once, so a loop ends."""
    found = Listing(folder)
    parents = folder.resolve().parents
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, parents)}  # a link to one of them is a loop
    waiting = [folder]
    while waiting:  # first what is in the folder itself, then what is linked: so names do not depend on links
        links = []
        for start in waiting:
            for here, inner, names in os.walk(start, onerror=lambda error: found.problems.append(_unreadable(error))):
                status = Path(here).stat()
                if (status.st_dev, status.st_ino) in seen:
                    inner.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                prefix = "".join(part + "/" for part in Path(here).relative_to(folder).parts)
                found.files.extend(prefix + name for name in names if not is_clutter(name))
                found.clutter.extend(prefix + name for name in names if is_clutter(name))
                found.clutter.extend(f"{prefix}{name}/" for name in inner if is_clutter(name))
                inner[:] = [name for name in inner if not is_clutter(name)]
                links += [Path(here) / name for name in inner if (Path(here) / name).is_symlink()]
        waiting = sorted(links)
    found.files.sort()
    found.clutter.sort()
    found.problems.sort(key=lambda problem: problem.id)
    return found


def _unreadable(error: OSError) -> Problem:
    name = safe_name(error.filename)
    message = f"{name}: the folder cannot be read ({error.strerror}), so its images are not known"
    return Problem(name, "missing image", message)
