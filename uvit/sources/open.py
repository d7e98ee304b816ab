"""Open what `--source` names: detect its kind, read its index, concatenate several sources, select a split.

Opening a source reads only its index. Images are decoded when a pair is read. All sources are picklable and hold no
open files, so worker processes can share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, groupby
from os.path import normpath
from pathlib import Path
from typing import Literal, cast

from uvit.errors import UserError
from uvit.sources import huggingface, tars
from uvit.sources.coco import find_captions, has_captions, open_coco
from uvit.sources.combine import ConcatSource, ConcatStream, SplitRule, SplitSource, SplitStream
from uvit.sources.files import NUM_CHECKED, FileSource
from uvit.sources.folders import FolderSource, open_folder
from uvit.sources.lists import LIST_SUFFIXES, names_images, open_list
from uvit.sources.names import Listing, list_files, say_not_read, some_of, stem_of, suffix_of
from uvit.sources.parquet_lists import lists_paths
from uvit.sources.shapes import ShapesSource
from uvit.sources.types import RandomAccessSource, Source

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SOURCE_KINDS = (
    "shapes, shapes:two, .tar files, a COCO captions .json, a .jsonl, .csv, .tsv or .parquet list, hf:HUB_ID, or a "
    "folder of one of these or of images, each with a .txt"
)

SourceKind = Literal["shapes", "tars", "coco", "list", "images", "dataset"]


@dataclass(frozen=True)
class _Input:
    """One entry of --source and its kind."""

    name: str  # as given
    kind: SourceKind
    files: tuple[str, ...]  # to read
    folder: Path | None = None  # of the images, if the entry has its own; --image_folder overrides it
    splits: str | None = None  # a description of its splits; None: it has only `train`
    listing: Listing | None = None  # of a folder that contains lists or tars
    images: FolderSource | None = None  # of a folder of images


def open_source(
    source: Sequence[str] | str,
    split: str = "train",
    image_folder: Sequence[str] = (),
    resolution: int = 256,
    *,
    val_every: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Source:
    """Detect the kind of each entry of `source`, read its index, and concatenate them.

    Args:
        split: `train` or `heldout` of shapes; the split of that name of folders and data sets.
        image_folder: the images of COCO caption files and of lists: one folder for all, or one for each.
        resolution: of the shapes; other images keep their size.
        val_every: for sources without splits: every so many pairs, one is `val` and the others are `train`.
        image_column, caption_column: of lists and Hugging Face data sets, if the columns have unusual names.
        streaming: read Hugging Face data sets without downloading them first.

    Raises UserError, which names the file and its content, if there is nothing to read.
    """
    names = [name for each in ([source] if isinstance(source, str) else source) for name in tars.expand(each)]
    if not names:
        raise UserError(f"--source: names no source; give {SOURCE_KINDS}")
    try:
        inputs = [
            _detect(name, split, val_every is not None, image_column, caption_column, bool(image_folder))
            for name in names
        ]
        _check_splits(inputs, split, val_every)
        _check_flags(inputs, image_column, caption_column, streaming)
        inputs = _with_folders(inputs, image_folder)
        # A data set has its own splits. --val_every then splits its `train`.
        open_dataset = partial(
            huggingface.open_dataset,
            split=split if val_every is None else "train",
            image_column=image_column,
            caption_column=caption_column,
            streaming=streaming,
        )
        opened: list[Source] = []
        for (kind, folder), group in groupby(inputs, key=lambda each: (each.kind, each.folder)):
            entries = list(group)
            files = [file for each in entries for file in each.files]
            if kind == "shapes":
                opened += [_shapes(name, split, resolution) for name in files]
            elif kind == "tars":
                opened.append(tars.open_tars(files))
            elif kind == "coco":  # files with the same folder describe the same images
                opened.append(open_coco([Path(file) for file in files], cast(Path, folder)))
            elif kind == "list":
                opened += [_open_lists(each, image_column, caption_column) for each in entries]
            elif kind == "images":
                opened += [cast(FolderSource, each.images) for each in entries]
            else:
                opened += [open_dataset(file) for file in files]
            for number, entry in enumerate(entries, start=-len(entries)):
                _say_unread(entry, opened[number] if kind == "list" else None)
    except OSError as error:
        raise UserError(f"--source {error.filename or names[0]}: cannot be read ({error.strerror})") from None
    whole = _concatenate(opened)
    if val_every is None:
        return whole
    rows = SplitRule(val_every, split)
    if not isinstance(whole, RandomAccessSource):
        return SplitStream(whole, rows)
    selected = SplitSource(whole, rows)
    if not len(selected):
        raise UserError(
            f"--val_every {val_every}: leaves --split {split} empty, of {len(whole)} pairs; give a smaller number"
        )
    return selected


def require_random_access(source: Source, flag: str) -> RandomAccessSource:
    """The source itself. Raises UserError, which begins with `flag`, if it has no random access."""
    if isinstance(source, RandomAccessSource):
        return source
    raise UserError(
        f"{flag}: can only be read from beginning to end, but this command reads pairs in any order; download it first"
    )


def _concatenate(opened: list[Source]) -> Source:
    if len(opened) == 1:
        return opened[0]
    with_random_access = [source for source in opened if isinstance(source, RandomAccessSource)]
    return ConcatSource(with_random_access) if len(with_random_access) == len(opened) else ConcatStream(opened)


def _shapes(name: str, split: str, resolution: int) -> Source:
    if split not in ("train", "heldout"):
        raise UserError(f"--split {split}: shapes have the splits train and heldout")
    return ShapesSource(split, resolution, 2 if name == "shapes:two" else 1)


def _open_lists(entry: _Input, image_column: str | None, caption_column: str | None) -> Source:
    base = entry.listing.folder if entry.listing else None
    lists = [open_list(Path(file), entry.folder, image_column, caption_column, base) for file in entry.files]
    return lists[0] if len(lists) == 1 else ConcatSource(list(lists))


# Detecting the kind


def _detect(
    name: str,
    split: str,
    has_val_every: bool,
    image_column: str | None,
    caption_column: str | None,
    has_image_folder: bool,
) -> _Input:
    if name == "shapes" or name.startswith("shapes:"):
        if name not in ("shapes", "shapes:two"):
            raise UserError(f"--source {name}: the built-in sources are shapes and shapes:two")
        return _Input(name, "shapes", (name,), splits="train and heldout")
    if name.startswith("hf:"):
        return _Input(name, "dataset", (name,), splits="its own")
    if tars.is_remote(name):
        return _Input(name, "tars", (name,))
    path = Path(name)
    if path.is_dir():
        if has_captions(path):
            captions, folder, is_one_of_several = find_captions(path, "train" if has_val_every else split)
            return _Input(name, "coco", (str(captions),), folder, "its caption files" if is_one_of_several else None)
        # Folders of splits come first. --val_every would mix them, so any of them is detected then, and refused later.
        inner = [path / name for name in dict.fromkeys([split, "train"] if has_val_every else [split])]
        bases: list[tuple[Path, str | None]] = [(base, f"{base.name}/") for base in inner if base.is_dir()]
        # With --image_folder, the images lie elsewhere.
        columns = None if has_image_folder else (image_column, caption_column)
        return _detect_folder(name, path, split, [*bases, (path, None)], columns)
    if not path.is_file():
        raise UserError(f"--source {name}: no such file or folder; give {SOURCE_KINDS}")
    suffix = suffix_of(path.name)
    if tars.is_tar(path.name):
        return _Input(name, "tars", (str(path),))
    if path.name.lower().endswith((".json", ".json.gz")):
        return _Input(name, "coco", (str(path),))
    if suffix == "parquet" and not lists_paths(path, image_column, caption_column):
        return _Input(name, "dataset", (str(path),))
    if suffix in LIST_SUFFIXES:
        return _Input(name, "list", (str(path),))
    if suffix == "tfrecord":
        raise _tfrecord(name)
    raise UserError(f"--source {name}: is a {path.suffix or 'nameless'} file; give {SOURCE_KINDS}")


def _detect_folder(
    name: str,
    path: Path,
    split: str,
    bases: list[tuple[Path, str | None]],
    columns: tuple[str | None, str | None] | None,
) -> _Input:
    """Which of the things in a folder holds its images: the most specific one. The others are not read.

    Args:
        bases: folders to look in, the first one first, and the splits that each is one of.
        columns: --image_column and --caption_column; None: lists count without a look at their images.

    Raises UserError if nothing does, or if several things do and none is more specific.
    """
    listings = [(list_files(base), splits) for base, splits in bases]
    for listing, splits in listings:
        lists = [file for file in METADATA if file in listing.files and _holds(listing.folder / file, columns)]
        if lists:
            return _Input(name, "list", (_only(name, listing, lists),), splits=splits, listing=listing)
    if huggingface.is_saved(path):
        return _Input(name, "dataset", (str(path),), splits="its own")
    tables = columns is not None and any(_contains_images(file, *columns) for file in _tables(path))
    for listing, splits in listings:
        found = [file for file in listing.files if suffix_of(file) == "tar"]
        if listing.folder == path:  # those of other splits do not count
            found = [file for file in found if file.partition("/")[0] not in huggingface.SPLITS]
        if found:
            if tables:
                _only(name, listing, [found[0], *(file for file in listing.files if file.endswith(".parquet"))])
            files = tuple(str(listing.folder / file) for file in found)
            return _Input(name, "tars", files, splits=splits, listing=listing)
    if tables:
        return _Input(name, "dataset", (str(path),), splits="its own")
    for listing, splits in listings:
        if (images := open_folder(listing.folder, listing)).is_captioned():
            return _Input(name, "images", (str(listing.folder),), splits=splits, images=images)
    for listing, splits in listings:
        others = [file for file in listing.top("jsonl", "csv", "tsv") if file not in METADATA]
        if lists := [file for file in others if _holds(listing.folder / file, columns)]:
            return _Input(name, "list", (_only(name, listing, lists),), splits=splits, listing=listing)
    for listing, splits in listings:
        if columns is not None and (inner := _metadata_of_folders(listing, columns, listing.folder == path)):
            paths = tuple(_only(name, listing, found) for found in inner)
            return _Input(name, "list", paths, splits=splits, listing=listing)
    # Nothing holds images. What could be meant says best what it lacks.
    if any(suffix_of(file) == "tfrecord" for listing, _ in listings for file in listing.files):
        raise _tfrecord(name)
    for listing, splits in listings:
        for file in METADATA:
            if file in listing.files:
                return _Input(name, "list", (str(listing.folder / file),), splits=splits, listing=listing)
        lists = listing.top("jsonl", "csv", "tsv")
        if len(lists) == 1:
            return _Input(name, "list", (str(listing.folder / lists[0]),), splits=splits, listing=listing)
    if huggingface.is_dataset(path):
        return _Input(name, "dataset", (str(path),), splits="its own")
    if compressed := [listing.folder / file for listing, _ in listings for file in listing.files if tars.is_tar(file)]:
        return _Input(name, "tars", (str(compressed[0]),))
    others = [each for each in huggingface.SPLITS if (path / each).is_dir()]
    if others and len(bases) == 1:
        raise UserError(f"--split {split}: {name} has no folder of this name; it has {', '.join(others)}")
    inside = sorted(entry.name for entry in path.iterdir())
    coco = [listing.folder / file for listing, _ in listings for file in listing.top("json")]
    hint = f"; if {coco[0].name} holds COCO captions, give --source {coco[0]} --image_folder {path}" if coco else ""
    raise UserError(
        f"--source {name}: contains {some_of(inside) or 'nothing'}; it needs annotations/ of COCO captions,"
        f" {METADATA[0]}, {METADATA[1]}, a data set, .tar files, or images each with a .txt{hint}"
    )


def _holds(path: Path, columns: tuple[str | None, str | None] | None) -> bool:
    return columns is None or names_images(path, *columns)


def _metadata_of_folders(listing: Listing, columns: tuple[str | None, str | None], has_splits: bool) -> list[list[str]]:
    """The metadata files of each inner folder that has some, but of folders within these."""
    found = dict[str, list[str]]()
    for file in listing.files:
        folder, _, base = file.rpartition("/")
        inner = folder.partition("/")[0]
        if folder and base in METADATA and not (has_splits and inner in huggingface.SPLITS):
            found.setdefault(folder, []).append(file)
    outer = [folder for folder in found if not any(str(each) in found for each in Path(folder).parents)]
    holding = ([file for file in found[folder] if _holds(listing.folder / file, columns)] for folder in outer)
    return [files for files in holding if files]


def _tables(folder: Path) -> list[Path]:
    """Some of its parquet files: one that contains images is among the first."""
    return sorted(folder.rglob("*.parquet"))[:NUM_CHECKED]


def _contains_images(table: Path, image_column: str | None, caption_column: str | None) -> bool:
    try:
        return not lists_paths(table, image_column, caption_column)
    except UserError:
        return False


def _only(name: str, listing: Listing, found: list[str]) -> str:
    """The path of the only one. Raises UserError if there are several."""
    paths = [str(listing.folder / file) for file in found]
    if len(paths) > 1:
        raise UserError(
            f"--source {name}: both {found[0]} and {some_of(found[1:])} hold captioned images; give one of them as"
            f" --source, such as --source {paths[0]}"
        )
    return paths[0]


def _tfrecord(name: str) -> UserError:
    return UserError(
        f"--source {name}: .tfrecord files cannot be read; write them as .tar files, with"
        " `--output_format webdataset` of img2dataset"
    )


def _say_unread(entry: _Input, source: Source | None) -> None:
    """Print which files of a folder are neither read nor listed as problems."""
    if entry.images:
        say_not_read(entry.name, entry.images.unread)
    elif entry.listing:
        base = entry.listing.folder
        used = {str(Path(file).relative_to(base)) for file in entry.files}
        lists = source.sources if isinstance(source, ConcatSource) else [source]
        if source:
            files = [each for each in lists if isinstance(each, FileSource)]
            if any(Path(each.folder) != base for each in files):
                return
            listed = set(entry.listing.files)  # of the names that the lists hold, there may be many more
            used |= {name for each in files for name in map(normpath, each.image_names()) if name in listed}
        else:
            used |= {stem_of(file) + ".parquet" for file in used}
        say_not_read(entry.name, entry.listing.unread(used))


# Checking the flags


def _check_splits(inputs: list[_Input], split: str, val_every: int | None) -> None:
    for each in inputs:
        if val_every is not None and each.splits and each.kind != "dataset":
            raise UserError(
                f"--val_every {val_every}: --source {each.name} already has splits, {each.splits}; give one as --split"
            )
        if val_every is None and not each.splits and split != "train":
            raise UserError(
                f"--split {split}: --source {each.name} has no such split; remove --split, or add --val_every 100 to "
                "make every hundredth pair val"
            )


def _check_flags(inputs: list[_Input], image_column: str | None, caption_column: str | None, streaming: bool) -> None:
    kinds, name = {each.kind for each in inputs}, inputs[0].name
    for flag, value in (("image_column", image_column), ("caption_column", caption_column)):
        if value is not None and not kinds & {"list", "dataset"}:
            raise UserError(
                f"--{flag} {value}: needs a list or a Hugging Face data set, and --source {name} is neither"
            )
    if streaming and "dataset" not in kinds:
        raise UserError(f"--streaming: needs a Hugging Face data set, which --source {name} is not")


def _with_folders(inputs: list[_Input], given: Sequence[str]) -> list[_Input]:
    """Add the folder of the images to the entries that need one."""
    with_images = [each for each in inputs if each.kind in ("coco", "list")]
    if given and not with_images:
        raise UserError(f"--image_folder {given[0]}: needs COCO or a list, which --source {inputs[0].name} is not")
    if len(given) not in (0, 1, len(with_images)):
        raise UserError(
            f"--image_folder: {len(given)} folders for {len(with_images)} caption files; give one, or one for each file"
        )
    folders = cycle(Path(folder) for folder in given)
    placed = [replace(each, folder=next(folders, each.folder)) if each in with_images else each for each in inputs]
    for each in placed:
        if each.kind == "coco" and each.folder is None:
            raise UserError(f"--source {each.name}: needs --image_folder, the folder with its images")
    return placed
