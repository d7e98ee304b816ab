"""Open what `--source` names: detect its kind, read its index, concatenate several sources, select a split.

Opening a source reads only its index. Images are decoded when a pair is read. All sources are picklable and hold no
open files, so worker processes can share them.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, groupby
from os.path import normpath
from pathlib import Path
from typing import cast

from uvit.config.source import SourceFlags, check_val_every
from uvit.errors import UserError
from uvit.sources import huggingface, tars
from uvit.sources.coco import open_coco
from uvit.sources.combine import ConcatSource, ConcatStream, SplitRule, SplitSource, SplitStream
from uvit.sources.files import NUM_CHECKED, FileSource
from uvit.sources.folders import FolderSource
from uvit.sources.kinds import SOURCE_KINDS, Input, detect
from uvit.sources.lists import open_list
from uvit.sources.names import say_not_read, stem_of
from uvit.sources.shapes import ShapesSource
from uvit.sources.types import PairError, RandomAccessSource, Source


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
    check_val_every(split, val_every)
    if not names:
        raise UserError(f"--source: names no source; give {SOURCE_KINDS}")
    for place, times in Counter(str(Path(name).resolve()) if Path(name).exists() else name for name in names).items():
        if times > 1:
            raise UserError(f"--source {place}: is given twice; remove one")
    try:
        inputs = [
            detect(name, split, val_every is not None, image_column, caption_column, bool(image_folder))
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
                if kind == "images":
                    _say_joined_lines(entry.name, opened[number])
            if kind == "tars":
                _say_joined_lines(entries[0].name, opened[-1])
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


def open_given(flags: SourceFlags, resolution: int = 256, streaming: bool = False) -> Source:
    """Open the source that the flags of a command name. Resolution and errors: as of `open_source`."""
    return open_source(
        flags.source,
        flags.split,
        flags.image_folder,
        resolution,
        val_every=flags.val_every,
        image_column=flags.image_column,
        caption_column=flags.caption_column,
        streaming=streaming,
    )


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


def _open_lists(entry: Input, image_column: str | None, caption_column: str | None) -> Source:
    base = entry.listing.folder if entry.listing else None
    lists = [
        open_list(Path(file), entry.folder, image_column, caption_column, base, entry.split) for file in entry.files
    ]
    return lists[0] if len(lists) == 1 else ConcatSource(list(lists))


def _say_unread(entry: Input, source: Source | None) -> None:
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


def _say_joined_lines(name: str, source: Source) -> None:
    """Print where most of the first captions have several lines: they may be a caption each."""
    if not isinstance(source, RandomAccessSource):
        return
    captions = list[str]()
    for row in range(min(len(source), NUM_CHECKED)):
        with contextlib.suppress(PairError):
            captions += source.captions(row)
    several = sum("\n" in caption for caption in captions)
    if several > len(captions) / 2:
        print(
            f"warning: --source {name}: {several} of the first {len(captions)} captions have several lines. A text "
            "file is one caption. If each line is a caption, write a metadata.jsonl in which `text` is a list"
        )


# Checking the flags


def _check_splits(inputs: list[Input], split: str, val_every: int | None) -> None:
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


def _check_flags(inputs: list[Input], image_column: str | None, caption_column: str | None, streaming: bool) -> None:
    kinds, name = {each.kind for each in inputs}, inputs[0].name
    for flag, value in (("image_column", image_column), ("caption_column", caption_column)):
        if value is not None and not kinds & {"list", "dataset"}:
            raise UserError(
                f"--{flag} {value}: needs a list or a Hugging Face data set, and --source {name} is neither"
            )
    if streaming and "dataset" not in kinds:
        raise UserError(f"--streaming: needs a Hugging Face data set, which --source {name} is not")


def _with_folders(inputs: list[Input], given: Sequence[str]) -> list[Input]:
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
