"""Which kind of source an entry of `--source` is: by its name, and by what lies in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uvit.errors import UserError
from uvit.sources import huggingface, tars
from uvit.sources.coco import find_captions, has_captions
from uvit.sources.files import NUM_CHECKED
from uvit.sources.folders import FolderSource, open_folder
from uvit.sources.lists import LIST_SUFFIXES, names_images
from uvit.sources.names import SPLITS, Listing, is_image, list_files, names_split, some_of, split_of, suffix_of
from uvit.sources.parquet_lists import lists_paths

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SOURCE_KINDS = (
    "shapes, shapes:two, .tar files, a COCO captions .json, a .jsonl, .csv, .tsv or .parquet list, hf:HUB_ID, or a "
    "folder of one of these or of images, each with a .txt"
)

SourceKind = Literal["shapes", "tars", "coco", "list", "images", "dataset"]


@dataclass(frozen=True)
class Input:
    """One entry of --source and its kind."""

    name: str  # as given
    kind: SourceKind
    files: tuple[str, ...]  # to read
    folder: Path | None = None  # of the images, if the entry has its own; --image_folder overrides it
    splits: str | None = None  # a description of its splits; None: it has only `train`
    split: str | None = None  # of a list, leave out what lies in folders of other splits than this
    listing: Listing | None = None  # of a folder that contains lists or tars
    images: FolderSource | None = None  # of a folder of images


def detect(
    name: str,
    split: str,
    has_val_every: bool,
    image_column: str | None,
    caption_column: str | None,
    has_image_folder: bool,
) -> Input:
    if name == "shapes" or name.startswith("shapes:"):
        if name not in ("shapes", "shapes:two"):
            raise UserError(f"--source {name}: the built-in sources are shapes and shapes:two")
        return Input(name, "shapes", (name,), splits="train and heldout")
    if name.startswith("hf:"):
        return Input(name, "dataset", (name,), splits="its own")
    path, own = Path(name), None
    if names_split(path.name, split) and not has_val_every:
        own = "the one in its name"
    if tars.is_remote(name):
        return Input(name, "tars", (name,), splits=own)
    if path.is_dir():
        if has_captions(path):
            captions, folder, has_splits = find_captions(path, None if has_val_every else split)
            return Input(name, "coco", (str(captions),), folder, "its caption files" if has_splits else None)
        # Folders of splits come first. --val_every would mix them, so any of them is detected then, and refused later.
        inner = [path / name for name in dict.fromkeys([split, "train"] if has_val_every else [split])]
        bases: list[tuple[Path, str | None]] = [(base, f"{base.name}/") for base in inner if base.is_dir()]
        # With --image_folder, the images lie elsewhere.
        columns = None if has_image_folder else (image_column, caption_column)
        return _detect_folder(name, path, None if has_val_every else split, [*bases, (path, None)], columns)
    if not path.is_file():
        raise UserError(f"--source {name}: no such file or folder; give {SOURCE_KINDS}")
    suffix = suffix_of(path.name)
    if tars.is_tar(path.name):
        return Input(name, "tars", (str(path),), splits=own)
    if path.name.lower().endswith((".json", ".json.gz")):
        return Input(name, "coco", (str(path),), splits=own)
    if suffix == "parquet" and not lists_paths(path, image_column, caption_column):
        return Input(name, "dataset", (str(path),), splits=own)
    if suffix in LIST_SUFFIXES:
        return Input(name, "list", (str(path),), splits=own)
    if suffix == "tfrecord":
        raise _tfrecord(name)
    raise UserError(f"--source {name}: is a {path.suffix or 'nameless'} file; give {SOURCE_KINDS}")


def _detect_folder(
    name: str,
    path: Path,
    split: str | None,
    bases: list[tuple[Path, str | None]],
    columns: tuple[str | None, str | None] | None,
) -> Input:
    """Which of the things in a folder holds its images: the most specific one. The others are not read.

    Args:
        split: None: all that is of one split, which --val_every divides.
        bases: folders to look in, the first one first, and the splits that each is one of.
        columns: --image_column and --caption_column; None: lists count without a look at their images.

    Raises UserError if nothing does, or if several things do and none is more specific.
    """
    listings = [(list_files(base), splits) for base, splits in bases]
    for listing, splits in listings:
        lists = [file for file in METADATA if file in listing.files and _holds(listing.folder / file, columns)]
        if lists:
            file, own = _only(name, listing, lists), None
            if columns is not None and listing.folder == path and (path / (split or "train")).is_dir():
                splits, own = "its folders", split or "train"
            return Input(name, "list", (file,), splits=splits, split=own, listing=listing)
    if huggingface.is_saved(path):
        return Input(name, "dataset", (str(path),), splits="its own")
    tables = columns is not None and any(_contains_images(file, *columns) for file in _tables(path))
    for listing, splits in listings:
        found = [file for file in listing.files if suffix_of(file) == "tar"]
        if listing.folder == path:
            found, splits = _of_split(found, split)
        if found:
            if tables:
                _only(name, listing, [found[0], *(file for file in listing.files if file.endswith(".parquet"))])
            files = tuple(str(listing.folder / file) for file in found)
            return Input(name, "tars", files, splits=splits, listing=listing)
    if tables:
        return Input(name, "dataset", (str(path),), splits="its own")
    for listing, splits in listings:
        has_images = (path / "train").is_dir() or any(is_image(file) for file in listing.files if "/" not in file)
        visible = listing.without_splits() if listing.folder == path and has_images else listing
        if (images := open_folder(listing.folder, visible)).is_captioned():
            return Input(name, "images", (str(listing.folder),), splits=splits, images=images)
    for listing, splits in listings:
        others = [file for file in listing.top(*LIST_SUFFIXES) if file not in METADATA]
        lists = [file for file in others if _holds(listing.folder / file, columns)]
        if listing.folder == path:
            lists, splits = _of_split(lists, split)
        if lists:
            are_parts = all(suffix_of(file) == "parquet" for file in lists)  # the parts of a table
            parts = [str(listing.folder / file) for file in lists] if are_parts else [_only(name, listing, lists)]
            return Input(name, "list", tuple(parts), splits=splits, listing=listing)
    for listing, splits in listings:
        if columns is not None and (inner := _metadata_of_folders(listing, columns, listing.folder == path)):
            paths = tuple(_only(name, listing, found) for found in inner)
            return Input(name, "list", paths, splits=splits, listing=listing)
    # Nothing holds images. What could be meant says best what it lacks.
    if any(suffix_of(file) == "tfrecord" for listing, _ in listings for file in listing.files):
        raise _tfrecord(name)
    for listing, splits in listings:
        for file in METADATA:
            if file in listing.files:
                return Input(name, "list", (str(listing.folder / file),), splits=splits, listing=listing)
        lists = listing.top("jsonl", "csv", "tsv")
        if len(lists) == 1:
            return Input(name, "list", (str(listing.folder / lists[0]),), splits=splits, listing=listing)
    if huggingface.is_dataset(path):
        return Input(name, "dataset", (str(path),), splits="its own")
    packed = (listing.folder / file for listing, _ in listings for file in listing.files if tars.is_tar(file))
    if compressed := next((file for file in packed if suffix_of(file.name) != "tar"), None):
        return Input(name, "tars", (str(compressed),))
    others = [each for each in SPLITS if (path / each).is_dir()]
    others += sorted({split_of(file) or "train" for file in listings[-1][0].top("tar", "parquet")} - {*others})
    if others and len(bases) == 1:
        raise UserError(f"--split {split or 'train'}: {name} has no such split; it has {', '.join(others)}")
    inside = sorted(entry.name for entry in path.iterdir())
    coco = [listing.folder / file for listing, _ in listings for file in listing.top("json")]
    hint = f"; if {coco[0].name} holds COCO captions, give --source {coco[0]} --image_folder {path}" if coco else ""
    raise UserError(
        f"--source {name}: contains {some_of(inside) or 'nothing'}; it needs annotations/ of COCO captions,"
        f" {METADATA[0]}, {METADATA[1]}, a data set, .tar files, or images each with a .txt{hint}"
    )


def _of_split(found: list[str], split: str | None) -> tuple[list[str], str | None]:
    """The files of a folder that are of a split by their names; and what the splits are, if there are others.

    split: None: if all are of one split, all.
    """
    of = {file: split_of(file) or "train" for file in found}
    are_several = len({*of.values()}) > 1
    if split is None and not are_several:
        return found, None
    wanted = split or "train"
    description = "those that its files name" if are_several or wanted != "train" else None
    return [file for file in found if of[file] == wanted], description


def _holds(path: Path, columns: tuple[str | None, str | None] | None) -> bool:
    return columns is None or names_images(path, *columns)


def _metadata_of_folders(listing: Listing, columns: tuple[str | None, str | None], has_splits: bool) -> list[list[str]]:
    """The metadata files of each inner folder that has some, but of folders within these."""
    found = dict[str, list[str]]()
    for file in listing.files:
        folder, _, base = file.rpartition("/")
        inner = folder.partition("/")[0]
        if folder and base in METADATA and not (has_splits and inner in SPLITS):
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
