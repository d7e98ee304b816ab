"""`uvit features merge`: copy several stores that the same encoders made into one. Files are copied unchanged."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from uvit.config.store import FeaturesMergeConfig
from uvit.errors import UserError, differences
from uvit.io import file_sha256, write_atomically, write_json
from uvit.lock import WriterLock
from uvit.progress import Progress
from uvit.store.manifest import Manifest, with_image_settings
from uvit.store.npy_convert import check_room
from uvit.store.shard import record_name
from uvit.store.splits import Split, find_stores
from uvit.store.writer import StoreInfo, StoreWriter

COPY_BYTES = 2**22  # bytes

Store = tuple[Split, Manifest]


def merge(config: FeaturesMergeConfig) -> None:
    """The command. Raises UserError if the stores differ in their settings, or if one is damaged."""
    stores = [store for path in config.paths for store in find_stores(path, config.split, flag="paths")]
    folder = Path(config.output_dir) / config.split
    check_compatible(stores)
    if folder.resolve() in [split.folder.resolve() for split, _ in stores]:
        raise UserError(f"--output_dir {config.output_dir}: is one of the inputs; choose another folder")
    with WriterLock(folder.with_name(f".{folder.name}.lock"), f"--output_dir {config.output_dir}"):
        writer = StoreWriter(folder, _info(stores, config.split))
        if not writer.complete:
            _copy_shards(stores, writer, config.disable_tqdm)
            first = stores[0][0].folder
            if (first / "tokenizer").is_dir():
                shutil.copytree(first / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
            empty_context, empty_tokens = (
                np.load(first / name, allow_pickle=False) if (first / name).is_file() else None
                for name in ("empty_context.npy", "empty_tokens.npy")
            )
            writer.finish(empty_context, empty_tokens, num_shards=sum(len(manifest.rows) for _, manifest in stores))
    num_pairs, num_repeated = count_ids(folder)
    print(f"{folder}: {num_pairs:,} pairs from {len(stores)} stores.")
    if num_repeated:
        print(f"{num_repeated:,} ids appear more than once. All of their pairs were kept.")


def check_compatible(stores: list[Store]) -> None:
    """Raises UserError if a store cannot be appended to the first. It lists the settings that differ."""
    first_split, first = stores[0]
    expected = _common_settings(first)
    for split, manifest in stores[1:]:
        if differing := differences(expected, _common_settings(manifest), ("of the first", "of this one")):
            raise UserError(
                f"--paths {split.folder}: was extracted with other settings than {first_split.folder}; only stores with"
                " the same settings can be merged: extract one of them again, or leave it out",
                list(differing.values()),
            )
    for key in ("vae", "text_encoder") if first.context_shape else ("vae",):
        if expected[f"{key} sha256"] is None and not (key == "vae" and first.images_shape):
            name = key.replace("_", " ")
            print(f"Warning: these stores do not record their {name}, so it may differ between them.")
    sources = [source for _, manifest in stores for source in _extractions(manifest.fields["source"])]
    for key in ("crop", "resize", "icc", "crop_before_resize"):
        values = dict.fromkeys(str(source[key]) for source in sources if key in source)
        if len(values) > 1:
            print(f"Warning: the images of these stores were not prepared alike ({key}: {', '.join(values)}).")


def _extractions(source: dict[str, Any]) -> list[dict[str, Any]]:
    """`source` of each extraction in a store, which may itself be merged."""
    if isinstance(merged := source.get("merged"), list):
        return [each for item in merged if isinstance(item, dict) for each in _extractions(item)]
    return [with_image_settings(source)]


def count_ids(folder: Path) -> tuple[int, int]:
    """(number of pairs, number of ids that appear more than once) of a store."""
    num_pairs = 0
    seen: set[str] = set()
    repeated: set[str] = set()
    for path in sorted(folder.glob("captions-*.jsonl")):
        for line in path.read_bytes().splitlines():
            id = json.loads(line)["id"]
            (repeated if id in seen else seen).add(id)
            num_pairs += 1
    return num_pairs, len(repeated)


def _common_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings that must be equal in all stores."""
    encoders: dict[str, Any] = {
        f"{what} sha256": manifest.encoder(what, "sha256") for what in ("vae", "text_encoder", "tokenizer", "teacher")
    }
    keys = "dtype moments_shape images_shape teacher_shape flipped context_shape num_tokens token_dtype"
    return encoders | {key: getattr(manifest, key) for key in keys.split()} | asdict(manifest.latent_space)


def _info(stores: list[Store], split: str) -> StoreInfo:
    first = stores[0][1]
    return StoreInfo(
        num_source_pairs=None,  # the shards keep their different numbers of rows
        shard_size=max(max(manifest.rows) for _, manifest in stores),
        dtype=first.dtype,
        moments_shape=first.moments_shape,
        images_shape=first.images_shape,
        teacher=first.fields.get("teacher"),
        teacher_shape=first.teacher_shape,
        flipped=first.flipped,
        context_shape=first.context_shape,
        num_tokens=first.num_tokens,
        token_dtype=first.token_dtype,
        **asdict(first.latent_space),
        split=split,
        source={
            "merged": [
                {
                    "folder": str(each.folder.resolve()),
                    "manifest_sha256": file_sha256(each.folder / "manifest.json"),
                    **manifest.fields["source"],
                }
                for each, manifest in stores
            ],
            "resolution": first.resolution,
        },
        **{what: first.fields[what] for what in ("vae", "text_encoder", "tokenizer")},
    )


def _copy_shards(stores: list[Store], writer: StoreWriter, disable_tqdm: bool) -> None:
    shards = [
        (split.folder, old, shard) for split, manifest in stores for old, shard in enumerate(manifest.fields["shards"])
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
            counts = {key: shard.get(key) for key in ("rows", "captions", "truncated_captions")}
            record: dict[str, Any] = counts | {"files": files}
            # The problems of a store are written with its first shard. In the end they form one list.
            write_json(
                writer.folder / record_name(number),
                record | {"problems": _problems(folder) if old == 0 else []},
                indent=1,
            )


def _problems(folder: Path) -> list[dict[str, Any]]:
    path = folder / "problems.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def copy(source: Path, target: Path, expected: dict[str, Any], advance: Callable[[int], object]) -> None:
    """Copy a file completely or not at all. Raises UserError if its size or checksum is not the recorded one."""
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
        f"--paths {source.parent}: {source.name} is missing or damaged; for details, run "
        f"`uvit features verify {shlex.quote(str(source.parent))}`"
    )
