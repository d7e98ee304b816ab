"""`uvit features merge`: several stores of the same encoders become one. Files are copied as they are."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uvit.config.store import FeaturesMergeConfig
from uvit.errors import UserError
from uvit.io import write_atomically, write_json
from uvit.progress import Progress
from uvit.store.manifest import Manifest
from uvit.store.npy_convert import check_room
from uvit.store.shard import record_name
from uvit.store.splits import Split, find_stores
from uvit.store.writer import StoreInfo, StoreWriter

COPY_BYTES = 2**22  # bytes

Part = tuple[Split, Manifest]


def merge(config: FeaturesMergeConfig) -> None:
    """The command. Raises UserError for parts that were not made alike, or that are damaged."""
    parts = [part for path in config.paths for part in find_stores(path, config.split, flag="paths")]
    folder = Path(config.output_dir).expanduser() / config.split
    check_alike(parts)
    if folder.resolve() in [split.folder.resolve() for split, _ in parts]:
        raise UserError(f"--output_dir {config.output_dir}: is one of the parts; choose another folder")
    writer = StoreWriter(folder, _info(parts, config.split))
    if not writer.complete:
        _copy_shards(parts, writer, config.disable_tqdm)
        first = parts[0][0].folder
        if (first / "tokenizer").is_dir():
            shutil.copytree(first / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        empty_context, empty_tokens = (
            np.load(first / name, allow_pickle=False) if (first / name).is_file() else None
            for name in ("empty_context.npy", "empty_tokens.npy")
        )
        writer.finish(empty_context, empty_tokens, num_shards=sum(len(manifest.rows) for _, manifest in parts))
    num_pairs, num_twice = count_ids(folder)
    print(f"{folder}: {num_pairs:,} pairs of {len(parts)} stores.")
    if num_twice:
        print(f"{num_twice:,} ids come more than once. These pairs were kept: extract again to have each once.")


def check_alike(parts: list[Part]) -> None:
    """Raises UserError, naming the entry and both its values, where a part cannot follow the first."""
    first_split, first = parts[0]
    expected = _entries(first)
    for split, manifest in parts[1:]:
        for key, value in _entries(manifest).items():
            if value != expected[key]:
                raise UserError(
                    f"--paths {split.folder}: its {key} is {value}, and that of {first_split.folder} is"
                    f" {expected[key]}; only stores made alike can become one"
                )
    for key in ("vae", "text_encoder") if first.context_shape else ("vae",):
        if expected[f"{key} sha256"] is None:
            print(f"The {key.replace('_', ' ')} of these stores is not recorded: nothing says that it is the same.")


def count_ids(folder: Path) -> tuple[int, int]:
    """(pairs, how many of their ids come more than once) of a store."""
    num_pairs = 0
    once: set[str] = set()
    twice: set[str] = set()
    for path in sorted(folder.glob("captions-*.jsonl")):
        for line in path.read_bytes().splitlines():
            id = json.loads(line)["id"]
            (twice if id in once else once).add(id)
            num_pairs += 1
    return num_pairs, len(twice)


def _entries(manifest: Manifest) -> dict[str, Any]:
    """What parts must have in common."""
    entries: dict[str, Any] = {
        f"{what} sha256": manifest.encoder(what, "sha256") for what in ("vae", "text_encoder", "tokenizer")
    }
    keys = "dtype moments_shape flipped context_shape num_tokens token_dtype latent_scale"
    return entries | {key: getattr(manifest, key) for key in keys.split()}


def _info(parts: list[Part], split: str) -> StoreInfo:
    first = parts[0][1]
    return StoreInfo(
        num_source_pairs=None,  # shards keep the numbers of rows that they have
        shard_size=max(max(manifest.rows) for _, manifest in parts),
        dtype=first.dtype,
        moments_shape=first.moments_shape,
        flipped=first.flipped,
        context_shape=first.context_shape,
        num_tokens=first.num_tokens,
        token_dtype=first.token_dtype,
        latent_scale=first.latent_scale,
        split=split,
        source={
            "merged": [
                {
                    "folder": str(part.folder.resolve()),
                    "manifest_sha256": hashlib.sha256((part.folder / "manifest.json").read_bytes()).hexdigest(),
                    **manifest.fields["source"],
                }
                for part, manifest in parts
            ],
            "resolution": first.resolution,
        },
        **{what: first.fields[what] for what in ("vae", "text_encoder", "tokenizer")},
    )


def _copy_shards(parts: list[Part], writer: StoreWriter, disable_tqdm: bool) -> None:
    shards = [
        (split.folder, old, shard) for split, manifest in parts for old, shard in enumerate(manifest.fields["shards"])
    ]
    sizes = [sum(file["bytes"] for file in shard["files"].values()) for _, _, shard in shards]
    check_room(sum(size for number, size in enumerate(sizes) if not writer.done(number)), writer.folder)
    with Progress("merge", sum(sizes), "byte", bar=not disable_tqdm) as progress:
        for number, (folder, old, shard) in enumerate(shards):
            if writer.done(number):
                progress.skip(sizes[number])
                continue
            files = {}
            for name, expected in shard["files"].items():
                renumbered = name.replace(f"-{old:05d}.", f"-{number:05d}.")
                copy(folder / name, writer.folder / renumbered, expected, progress.update)
                files[renumbered] = expected
            record: dict[str, Any] = {"rows": shard["rows"], "captions": shard["captions"], "files": files}
            # A part's problems go along with its first shard: all that is made of them is one list.
            write_json(
                writer.folder / record_name(number),
                record | {"problems": _problems(folder) if old == 0 else []},
                indent=1,
            )


def _problems(folder: Path) -> list[dict[str, Any]]:
    path = folder / "problems.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def copy(source: Path, target: Path, expected: dict[str, Any], advance: Callable[[int], object]) -> None:
    """Whole or not at all. Raises UserError where the source is not what its store says it is."""
    digest = hashlib.sha256()
    try:
        with write_atomically(target) as aside, source.open("rb") as file, aside.open("wb") as out:
            while block := file.read(COPY_BYTES):
                digest.update(block)
                out.write(block)
                advance(len(block))
            if digest.hexdigest() == expected["sha256"]:
                return
            raise FileNotFoundError
    except FileNotFoundError:
        pass
    raise UserError(
        f"--paths {source.parent}: {source.name} is missing or not what was written; `uvit features verify` says what"
        " to do"
    )
