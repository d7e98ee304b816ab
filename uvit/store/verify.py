"""`uvit features verify`: is every byte what was written, and does what was written make sense?"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from uvit.config.store import FeaturesVerifyConfig
from uvit.errors import UserError
from uvit.progress import Progress, write
from uvit.store.manifest import Manifest
from uvit.store.npy_convert import MARK
from uvit.store.npy_layout import NPY_NAME, load_npy, num_captions
from uvit.store.reader import FeatureStore
from uvit.store.splits import Split, find_splits

NUM_FILES_AT_ONCE = 2
READ_BYTES = 2**22  # bytes
ROWS_AT_A_TIME = 64
NAMED = 5  # pairs that are named, of those that are wrong
BOOKKEEPING = re.compile(r"manifest\.json|settings\.json|stream-end\.json|shard-\d{5}\.json")

AGAIN = "extract the split again"
NOT_FINITE = "extract the split again without them, or with --dtype float32 if it is float16 that they do not fit"

Advance = Callable[[int], object]  # tells that so many bytes were read


def verify(config: FeaturesVerifyConfig) -> int:
    """The command: prints a line for each thing that is wrong; the exit status is 1 where there is any.

    Raises UserError where there are no features.
    """
    splits = find_splits(config.path, config.split)
    num_wrong = 0
    lock = threading.Lock()
    with Progress("verify", sum(map(_num_bytes, splits)), "byte", bar=not config.disable_tqdm) as progress:

        def advance(num_bytes: int) -> None:
            with lock:
                progress.update(num_bytes)

        for split in splits:
            for wrong in check(split, advance):
                write(f"{split.name}: {wrong}")
                num_wrong += 1
    names = ", ".join(split.name for split in splits)
    if num_wrong:
        print(f"{config.path} ({names}): {num_wrong:,} thing{'s are' if num_wrong > 1 else ' is'} wrong.")
        return 1
    print(f"{config.path} ({names}): all is well.")
    return 0


def check(split: Split, advance: Advance) -> Iterator[str]:
    """What is wrong with a split, a sentence for each."""
    if split.kind == "unfinished":
        yield "it was not finished; run the command that began it again"
    elif split.manifest is None:
        yield from _check_old_layout(split, advance)
    else:
        yield from _check_store(split, split.manifest, advance)


def _num_bytes(split: Split) -> int:
    if split.manifest is not None:
        return sum(file["bytes"] for file in split.manifest.files.values())
    if split.kind == "old layout":
        return sum(path.stat().st_size for path in split.own_files() if NPY_NAME.fullmatch(path.name))
    return 0


# A store


def _check_store(split: Split, manifest: Manifest, advance: Advance) -> Iterator[str]:
    def check_file(name: str) -> str | None:
        if wrong := _bytes_of(split.folder / name, manifest.files[name], advance):
            return f"{wrong}; {_remedy(name)}"
        return _content_of(split.folder, name, manifest)

    damaged = set()
    with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        for name, wrong in zip(manifest.files, pool.map(check_file, manifest.files), strict=True):
            if wrong:
                damaged.add(name)
                yield f"{name} {wrong}"
    for shard in range(len(manifest.rows)):
        captions, counts = f"captions-{shard:05d}.jsonl", f"counts-{shard:05d}.npy"
        if {captions, counts} <= manifest.files.keys() - damaged:
            wrong = _captions(split.folder / captions, np.load(split.folder / counts, allow_pickle=False).tolist())
            if wrong:
                damaged.add(captions)
                yield f"{captions} {wrong}"
    if not damaged:
        try:
            FeatureStore(split.folder, flag="path")  # as training opens it
        except UserError as error:
            yield str(error)
    for path in sorted(split.own_files()):
        name = path.relative_to(split.folder).as_posix()
        if name not in manifest.files and not BOOKKEEPING.fullmatch(name):
            yield f"{name} is no part of the store; move it away if nothing needs it"


def _bytes_of(path: Path, expected: dict[str, Any], advance: Advance) -> str | None:
    """Are they those that were written?"""
    size = path.stat().st_size if path.is_file() else None
    if size != expected["bytes"]:
        advance(expected["bytes"])
        return "is missing" if size is None else f"has {size:,} bytes, not {expected['bytes']:,}"
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest.hexdigest() == expected["sha256"] else "does not hold the bytes that were written"


def _remedy(name: str) -> str:
    number = re.search(r"-(\d{5})\.", name)
    record = f" and shard-{number[1]}.json" if number else ""
    return f"copy it again, or remove it, manifest.json{record} and run the command that made the store again"


def _content_of(folder: Path, name: str, manifest: Manifest) -> str | None:
    """Does it hold what the manifest says, and what can be used?"""
    if name == "problems.jsonl":
        return _problems(folder / name, manifest)
    match = re.fullmatch(r"(moments|flipped|contexts|tokens|counts)-(\d{5})\.npy", name)
    if match is None or int(match[2]) >= len(manifest.rows):
        shape = {"empty_context.npy": manifest.context_shape, "empty_tokens.npy": (manifest.num_tokens,)}.get(name)
        dtype = manifest.dtype if name == "empty_context.npy" else manifest.token_dtype
        return _array(folder / name, shape, dtype) if shape else None
    kind, shard = match[1], int(match[2])
    rows, captions = manifest.rows[shard], manifest.captions[shard]
    if kind == "counts":
        wrong = _array(folder / name, (rows,), "int32")
        if wrong or (total := int(np.load(folder / name).sum())) == captions:
            return wrong
        return f"counts {total:,} captions, and manifest.json {captions:,}; {AGAIN}"
    if kind == "tokens":
        return _array(folder / name, (captions, manifest.num_tokens), manifest.token_dtype)
    if kind == "contexts":
        return _array(folder / name, (captions, *(manifest.context_shape or ())), manifest.dtype)
    wrong = _array(folder / name, (rows, *manifest.moments_shape), manifest.dtype, finite=False)
    if wrong or not (bad := _not_finite(np.load(folder / name, mmap_mode="r"))):
        return wrong
    named = ", ".join(_names(folder, shard, bad[:NAMED])) + (", ..." if len(bad) > NAMED else "")
    return f"has {len(bad):,} pairs with values that are not finite ({named}); {NOT_FINITE}"


def _array(path: Path, shape: tuple[int, ...], dtype: str | None, finite: bool = True) -> str | None:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return f"cannot be read as an array ({error}); {AGAIN}"
    if array.shape != shape or array.dtype.name != dtype:
        return f"holds {array.dtype} {array.shape}, and by manifest.json {dtype} {shape}; {AGAIN}"
    if finite and array.dtype.kind == "f" and (bad := _not_finite(array)):
        return f"has {len(bad):,} of {len(array):,} items with values that are not finite; {NOT_FINITE}"
    return None


def _not_finite(array: np.ndarray) -> list[int]:
    """Which items (of the first axis) hold infinities or what is not a number."""
    bad: list[int] = []
    for start in range(0, len(array), ROWS_AT_A_TIME):
        part = np.isfinite(array[start : start + ROWS_AT_A_TIME])
        bad += (start + np.flatnonzero(~part.reshape(len(part), -1).all(axis=1))).tolist()
    return bad


def _names(folder: Path, shard: int, rows: list[int]) -> list[str]:
    """The pairs' ids, or their rows where the captions file is damaged too."""
    try:
        lines = (folder / f"captions-{shard:05d}.jsonl").read_bytes().splitlines()
        return [str(json.loads(lines[row])["id"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return [f"row {row} of the shard" for row in rows]


def _captions(path: Path, counts: list[int]) -> str | None:
    """A line a pair, with as many captions as it is said to have, or none in all where their text is not known."""
    numbers = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            pair = json.loads(line)
            texts = [pair["id"], *pair["captions"]]
        except (ValueError, KeyError, TypeError) as error:
            return f"has a broken line {number} ({type(error).__name__}: {error}); {AGAIN}"
        if not all(isinstance(text, str) for text in texts):
            return f"has a broken line {number} (id and captions must be strings); {AGAIN}"
        numbers.append(len(texts) - 1)
    if len(numbers) != len(counts):
        return f"has {len(numbers):,} lines, and the shard {len(counts):,} pairs; {AGAIN}"
    for number, (found, expected) in enumerate(zip(numbers, counts, strict=True), start=1):
        if found != expected and any(numbers):
            return f"has {found} captions in line {number}, and {expected} are counted; {AGAIN}"
    return None


def _problems(path: Path, manifest: Manifest) -> str | None:
    try:
        kinds = Counter(json.loads(line)["kind"] for line in path.read_bytes().splitlines())
    except (ValueError, KeyError, TypeError) as error:
        return f"has a broken line ({type(error).__name__}: {error}); {AGAIN}"
    if kinds != Counter(manifest.fields.get("problems")):
        return f"and manifest.json disagree on the number of problems; {AGAIN}"
    return None


# The old layout


def _check_old_layout(split: Split, advance: Advance) -> Iterator[str]:
    """It has no checksums: numbers, shapes and values."""
    try:
        counts = num_captions(split.folder)
        moments, context = load_npy(split.folder / "0.npy"), load_npy(split.folder / "0_0.npy")
        empty_context = load_npy(split.folder.parent / "empty_context.npy")
    except UserError as error:
        yield str(error).removeprefix("--path: ")
        return
    if empty_context.shape != context.shape:
        yield f"empty_context.npy holds {empty_context.shape}, and 0_0.npy {context.shape}; make it again"

    def check_pair(row: int) -> list[str]:
        shapes = {f"{row}.npy": moments.shape} | {f"{row}_{k}.npy": context.shape for k in range(counts[row])}
        wrong = []
        for name, shape in shapes.items():
            advance((split.folder / name).stat().st_size)
            try:
                array = load_npy(split.folder / name)
            except UserError as error:
                wrong.append(str(error).removeprefix("--path: "))
                continue
            if array.shape != shape or array.dtype.kind != "f":
                wrong.append(f"{name} holds {array.dtype} {array.shape}, and the others {shape}; copy it again")
            elif not np.isfinite(array).all():
                wrong.append(f"{name} holds values that are not finite; make it again")
        return wrong

    with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        for wrong in pool.map(check_pair, range(len(counts))):
            yield from wrong
    for path in sorted(split.own_files()):
        if not NPY_NAME.fullmatch(path.name) and path.name != MARK:
            yield f"{path.name} is no part of the old layout; move it away if nothing needs it"
