"""Read the manifest of a feature store. Every field is checked here, once, so the reader can rely on it.

A manifest may come from another program or a newer uvit. It may be truncated or edited by hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from uvit.conventions import LatentSpace
from uvit.errors import UserError

STORE_FORMAT, VERSION = "uvit features", 3
LATENTS_VERSION = 2  # of stores with moments, which older versions of uvit can read
# How images were prepared where `source` of a manifest does not say it: so did the versions before it was recorded.
EARLIER_IMAGES = {"icc": "ignore", "crop_before_resize": False}


@dataclass(frozen=True)
class Manifest:
    """The fields of `manifest.json` that readers use."""

    fields: dict[str, Any]  # the whole file
    split: str | None  # None: format version 1, which has no splits
    num_pairs: int
    flipped: bool
    dtype: str
    moments_shape: tuple[int, ...] | None  # (2 C, h, w)
    images_shape: tuple[int, ...] | None  # (3, H, W); one of the two is None
    teacher_shape: tuple[int, ...] | None  # (C, h, w) of the features of a vision model
    context_shape: tuple[int, ...] | None  # (T, D)
    num_tokens: int
    token_dtype: str | None
    latent_space: LatentSpace
    resolution: int | None
    rows: list[int]  # of each shard
    captions: list[int]  # of each shard
    num_truncated: int | None  # captions with more tokens than num_tokens; None: not known
    files: dict[str, dict[str, Any]]  # every file by its name: {"bytes", "sha256"}

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the moments, or (3, H, W) of the images."""
        if self.images_shape is not None:
            return self.images_shape
        assert self.moments_shape is not None
        return self.moments_shape[0] // 2, *self.moments_shape[1:]

    def encoder(self, what: str, field: str) -> str | None:
        """`name` or `sha256` of `vae`, `text_encoder`, `tokenizer` or `teacher`. None: not known."""
        return (self.fields.get(what) or {}).get(field) or None


def read_manifest(folder: Path, error: Callable[[str], UserError]) -> Manifest:
    """Read `manifest.json` of a folder. Raises what `error` makes of a description of the mistake."""
    try:
        fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"manifest.json cannot be read ({reason}); copy it again, or extract it again") from None
    if not isinstance(fields, dict) or fields.get("format") != STORE_FORMAT:
        raise error("manifest.json is not the manifest of a feature store; give another folder")
    version = fields.get("version")
    if version not in range(1, VERSION + 1):
        raise error(
            f"has format version {version!r}, but this uvit reads 1 to {VERSION}; update uvit, or extract it again"
        )
    try:
        return _checked(fields)
    except (_DamageError, OverflowError) as mistake:
        raise error(f"manifest.json is damaged: {mistake}; copy it again, or extract it again") from None


def with_image_settings(source: dict[str, Any]) -> dict[str, Any]:
    """`source` of a manifest or settings.json, with what an extraction by an earlier version does not say."""
    return source | {key: value for key, value in EARLIER_IMAGES.items() if "crop" in source and key not in source}


class _DamageError(Exception):
    """Says which field is wrong, and why."""


def _checked(fields: dict[str, Any]) -> Manifest:
    old = fields["version"] == 1
    context_shape = _shape(fields, "context_shape", 2) if _get(fields, "context_shape") is not None else None
    token_dtype = _choice(fields, "token_dtype", ("uint16", "int32", None))
    if context_shape is None and token_dtype is None:
        raise _DamageError("it has neither text embeddings (context_shape) nor token ids (token_dtype)")
    teacher_shape = _shape(fields, "teacher_shape", 3) if fields.get("teacher_shape") is not None else None
    for what in ("vae", "text_encoder", "tokenizer", *(["teacher"] if teacher_shape else [])):
        named = _typed(fields, what, dict, type(None))
        for key in named or ():
            _typed(named, key, str, where=f"{what}.")
    _typed(fields, "latent_scale", int, float)
    try:
        latent_space = LatentSpace.recorded(fields)
        moments_shape = None if latent_space.is_pixels else _shape(fields, "moments_shape", 3)
        images_shape = _shape(fields, "images_shape", 3) if latent_space.is_pixels else None
        latent_space.check_channels(3 if moments_shape is None else moments_shape[0] // 2)
    except ValueError as error:
        raise _DamageError(str(error)) from None
    if moments_shape is not None and moments_shape[0] % 2:
        raise _DamageError(f"moments_shape is {list(moments_shape)}, but moments are means and as many log-variances")
    if images_shape is not None and images_shape[0] != 3:
        raise _DamageError(f"images_shape is {list(images_shape)}, but images have 3 channels")
    source = _typed(fields, "source", dict)
    shards = _typed(fields, "shards", list)
    num_pairs, num_captions = _count(fields, "num_pairs"), _count(fields, "num_captions")
    files = _files(fields)
    for i, shard in enumerate(shards):
        if not isinstance(shard, dict):
            raise _DamageError(f"shards[{i}] is {type(shard).__name__}, but must be dict")
        files |= _files(shard, f"shards[{i}].")
    manifest = Manifest(
        fields=fields,
        split=None if old else _typed(fields, "split", str),
        num_pairs=num_pairs,
        flipped=False if old else _typed(fields, "flipped", bool),
        dtype=_choice(fields, "dtype", ("float16", "float32")),
        moments_shape=moments_shape,
        images_shape=images_shape,
        teacher_shape=teacher_shape,
        context_shape=context_shape,
        num_tokens=_count(fields, "num_tokens"),
        token_dtype=token_dtype,
        latent_space=latent_space,
        resolution=None if source.get("resolution") is None else _count(source, "resolution", "source."),
        rows=[_count(shard, "rows", f"shards[{i}].") for i, shard in enumerate(shards)],
        captions=[_count(shard, "captions", f"shards[{i}].") for i, shard in enumerate(shards)],
        num_truncated=_count(fields, key) if fields.get(key := "num_truncated_captions") is not None else None,
        files=files,
    )
    for key, total, counts in (
        ("num_pairs", num_pairs, manifest.rows),
        ("num_captions", num_captions, manifest.captions),
    ):
        if total != sum(counts):
            raise _DamageError(f"{key} is {total}, but the shards have {sum(counts)}")
    if context_shape and context_shape[0] != manifest.num_tokens:
        raise _DamageError(f"num_tokens is {manifest.num_tokens}, but context_shape is {list(context_shape)}")
    return manifest


def _get(fields: dict[str, Any], key: str, where: str = "") -> Any:
    if key not in fields:
        raise _DamageError(f"{where}{key} is missing")
    return fields[key]


def _typed(fields: dict[str, Any], key: str, *types: type, where: str = "") -> Any:
    value = _get(fields, key, where)
    if type(value) not in types:  # not isinstance: in Python, True is an int
        wanted = " or ".join(wanted.__name__ for wanted in types)
        raise _DamageError(f"{where}{key} is {type(value).__name__}, but must be {wanted}")
    return value


def _count(fields: dict[str, Any], key: str, where: str = "") -> int:
    value = _typed(fields, key, int, where=where)
    if value < 0:
        raise _DamageError(f"{where}{key} is {value}, but must not be negative")
    return value


def _choice(fields: dict[str, Any], key: str, choices: tuple[str | None, ...]) -> Any:
    value = _get(fields, key)
    if value not in choices:
        raise _DamageError(f"{key} is {value!r}, but must be one of {', '.join(map(str, choices))}")
    return value


def _shape(fields: dict[str, Any], key: str, num_axes: int) -> tuple[int, ...]:
    value = _typed(fields, key, list)
    if len(value) != num_axes or not all(type(size) is int and size > 0 for size in value):
        raise _DamageError(f"{key} is {value}, but must be {num_axes} numbers above 0")
    return tuple(value)


def _files(fields: dict[str, Any], where: str = "") -> dict[str, dict[str, Any]]:
    files = _typed(fields, "files", dict, where=where)
    for name, described in files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
            raise _DamageError(f"{where}files lists {name!r}, which is not inside the folder")
        if not isinstance(described, dict):
            raise _DamageError(f"{where}files.{name} is {type(described).__name__}, but must be dict")
        _count(described, "bytes", f"{where}files.{name}.")
        _typed(described, "sha256", str, where=f"{where}files.{name}.")
    return dict(files)
