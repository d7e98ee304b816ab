"""`uvit features verify`: compare every file with its checksum, and check the values in it."""

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
from uvit.store.npy_layout import MARK, NPY_NAME, load_npy, num_captions
from uvit.store.reader import FeatureStore
from uvit.store.splits import Split, find_splits

NUM_FILES_AT_ONCE = 2
READ_BYTES = 2**22  # bytes
ROWS_AT_A_TIME = 64
MAX_NAMED = 5  # pairs that a message names
BOOKKEEPING = re.compile(r"manifest\.json|settings\.json|stream-end\.json|shard-\d{5}\.json")

EXTRACT_AGAIN = "extract the split again"
NOT_FINITE = "extract the split again without them, or with --dtype float32 if they exceed the range of float16"

Advance = Callable[[int], object]  # called with the number of bytes that were read


def verify(config: FeaturesVerifyConfig) -> int:
    """The command. Prints one line for each problem; the exit status is 1 if there is any.

    Raises UserError if there are no features.
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
        print(f"{config.path} ({names}): {num_wrong:,} problem{'s'[: num_wrong > 1]} found.")
        return 1
    print(f"{config.path} ({names}): no problems found.")
    return 0


def check(split: Split, advance: Advance) -> Iterator[str]:
    """The problems of a split, one sentence each."""
    if split.kind == "unfinished":
        yield "is not finished; run the command that started it again"
    elif split.manifest is None:
        yield from _check_npy(split, advance)
    else:
        yield from _check_store(split, split.manifest, advance)


def _num_bytes(split: Split) -> int:
    if split.manifest is not None:
        return sum(file["bytes"] for file in split.manifest.files.values())
    if split.kind == "npy":
        return sum(path.stat().st_size for path in split.own_files() if NPY_NAME.fullmatch(path.name))
    return 0


# Feature stores


def _check_store(split: Split, manifest: Manifest, advance: Advance) -> Iterator[str]:
    def check_file(name: str) -> str | None:
        if problem := _check_bytes(split.folder / name, manifest.files[name], advance):
            return f"{problem}; {_remedy(name)}"
        return _check_content(split.folder, name, manifest)

    damaged = set()
    with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        for name, problem in zip(manifest.files, pool.map(check_file, manifest.files), strict=True):
            if problem:
                damaged.add(name)
                yield f"{name} {problem}"
    for shard in range(len(manifest.rows)):
        captions, counts = f"captions-{shard:05d}.jsonl", f"counts-{shard:05d}.npy"
        if {captions, counts} <= manifest.files.keys() - damaged:
            expected = np.load(split.folder / counts, allow_pickle=False).tolist()
            if problem := _check_captions(split.folder / captions, expected):
                damaged.add(captions)
                yield f"{captions} {problem}"
    if not damaged:
        try:
            FeatureStore(split.folder, flag="path")  # checks what training checks
        except UserError as error:
            yield str(error)
    for path in sorted(split.own_files()):
        name = path.relative_to(split.folder).as_posix()
        if name not in manifest.files and not BOOKKEEPING.fullmatch(name):
            yield f"{name} does not belong to the store; move it away if you do not need it"


def _check_bytes(path: Path, expected: dict[str, Any], advance: Advance) -> str | None:
    """Compare size and checksum with the manifest."""
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
    return None if digest.hexdigest() == expected["sha256"] else "has another checksum than manifest.json says"


def _remedy(name: str) -> str:
    number = re.search(r"-(\d{5})\.", name)
    record = f" and shard-{number[1]}.json" if number else ""
    return f"copy it again; or remove it, manifest.json{record}, and run the command that made the store again"


def _check_content(folder: Path, name: str, manifest: Manifest) -> str | None:
    """Compare the content with the manifest, and check that all values are finite."""
    if name == "problems.jsonl":
        return _check_problems(folder / name, manifest)
    match = re.fullmatch(r"(moments|flipped|images|teacher|contexts|tokens|counts)-(\d{5})\.npy", name)
    if match is None or int(match[2]) >= len(manifest.rows):
        shape = {"empty_context.npy": manifest.context_shape, "empty_tokens.npy": (manifest.num_tokens,)}.get(name)
        dtype = manifest.dtype if name == "empty_context.npy" else manifest.token_dtype
        return _check_array(folder / name, shape, dtype) if shape else None
    kind, shard = match[1], int(match[2])
    rows, captions = manifest.rows[shard], manifest.captions[shard]
    if kind == "counts":
        problem = _check_array(folder / name, (rows,), "int32")
        if problem or (total := int(np.load(folder / name).sum())) == captions:
            return problem
        return f"counts {total:,} captions, but manifest.json says {captions:,}; {EXTRACT_AGAIN}"
    if kind == "tokens":
        return _check_array(folder / name, (captions, manifest.num_tokens), manifest.token_dtype)
    if kind == "contexts":
        return _check_array(folder / name, (captions, *(manifest.context_shape or ())), manifest.dtype)
    if kind == "teacher":
        return _check_array(folder / name, (rows, *(manifest.teacher_shape or ())), "float16")
    if kind == "images":
        return _check_array(folder / name, (rows, *(manifest.images_shape or ())), "uint8")
    problem = _check_array(folder / name, (rows, *(manifest.moments_shape or ())), manifest.dtype, finite=False)
    if problem or not (bad := _not_finite(np.load(folder / name, mmap_mode="r"))):
        return problem
    names = ", ".join(_names(folder, shard, bad[:MAX_NAMED])) + (", ..." if len(bad) > MAX_NAMED else "")
    return f"has {len(bad):,} pairs with values that are NaN or infinite ({names}); {NOT_FINITE}"


def _check_array(path: Path, shape: tuple[int, ...], dtype: str | None, finite: bool = True) -> str | None:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, SystemError) as error:  # whatever a damaged header raises
        return f"cannot be read as an array ({error}); {EXTRACT_AGAIN}"
    if array.shape != shape or array.dtype.name != dtype:
        return f"contains {array.dtype} {array.shape}, but manifest.json says {dtype} {shape}; {EXTRACT_AGAIN}"
    if finite and array.dtype.kind == "f" and (bad := _not_finite(array)):
        return f"has {len(bad):,} of {len(array):,} items with values that are NaN or infinite; {NOT_FINITE}"
    return None


def _not_finite(array: np.ndarray) -> list[int]:
    """The indices along the first axis whose items contain NaN or infinite values."""
    bad: list[int] = []
    for start in range(0, len(array), ROWS_AT_A_TIME):
        finite = np.isfinite(array[start : start + ROWS_AT_A_TIME])
        bad += (start + np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))).tolist()
    return bad


def _names(folder: Path, shard: int, rows: list[int]) -> list[str]:
    """The ids of the pairs, or their rows if the captions file is damaged too."""
    try:
        lines = (folder / f"captions-{shard:05d}.jsonl").read_bytes().splitlines()
        return [str(json.loads(lines[row])["id"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return [f"row {row} of the shard" for row in rows]


def _check_captions(path: Path, counts: list[int]) -> str | None:
    """One line per pair, with the given number of captions. If their text is not known, all lines have none."""
    numbers = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            pair = json.loads(line)
            texts = [pair["id"], *pair["captions"]]
        except (ValueError, KeyError, TypeError) as error:
            return f"has a broken line {number} ({type(error).__name__}: {error}); {EXTRACT_AGAIN}"
        if not all(isinstance(text, str) for text in texts):
            return f"has a broken line {number} (id and captions must be strings); {EXTRACT_AGAIN}"
        numbers.append(len(texts) - 1)
    if len(numbers) != len(counts):
        return f"has {len(numbers):,} lines, but the shard has {len(counts):,} pairs; {EXTRACT_AGAIN}"
    for number, (found, expected) in enumerate(zip(numbers, counts, strict=True), start=1):
        if found != expected and any(numbers):
            return f"has {found} captions in line {number}, but the counts say {expected}; {EXTRACT_AGAIN}"
    return None


def _check_problems(path: Path, manifest: Manifest) -> str | None:
    try:
        kinds = Counter(json.loads(line)["kind"] for line in path.read_bytes().splitlines())
    except (ValueError, KeyError, TypeError) as error:
        return f"has a broken line ({type(error).__name__}: {error}); {EXTRACT_AGAIN}"
    if kinds != Counter(manifest.fields.get("problems")):
        return f"and manifest.json give different numbers of problems; {EXTRACT_AGAIN}"
    return None


# .npy features


def _check_npy(split: Split, advance: Advance) -> Iterator[str]:
    """There are no checksums. This checks that files are complete in number, their shapes and their values."""
    try:
        counts = num_captions(split.folder)
        moments, context = load_npy(split.folder / "0.npy"), load_npy(split.folder / "0_0.npy")
        empty_context = load_npy(split.folder.parent / "empty_context.npy")
    except UserError as error:
        yield str(error).removeprefix("--path: ")
        return
    if empty_context.shape != context.shape:
        yield f"empty_context.npy has shape {empty_context.shape}, but 0_0.npy has {context.shape}; make it again"

    def check_pair(row: int) -> list[str]:
        shapes = {f"{row}.npy": moments.shape} | {f"{row}_{k}.npy": context.shape for k in range(counts[row])}
        problems = []
        for name, shape in shapes.items():
            advance((split.folder / name).stat().st_size)
            try:
                array = load_npy(split.folder / name)
            except UserError as error:
                problems.append(str(error).removeprefix("--path: "))
                continue
            if array.shape != shape or array.dtype.kind != "f":
                problems.append(f"{name} has {array.dtype} {array.shape}, but the others have {shape}; copy it again")
            elif not np.isfinite(array).all():
                problems.append(f"{name} has values that are NaN or infinite; make it again")
        return problems

    with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        for problems in pool.map(check_pair, range(len(counts))):
            yield from problems
    for path in sorted(split.own_files()):
        if not NPY_NAME.fullmatch(path.name) and path.name != MARK:
            yield f"{path.name} does not belong to .npy features; move it away if you do not need it"
