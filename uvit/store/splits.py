"""The splits that a folder of features holds: finished stores, unfinished ones, and the old layout."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uvit.errors import UserError
from uvit.store.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Split:
    """A folder with features."""

    name: str
    folder: Path
    kind: Literal["store", "unfinished", "old layout"]
    settings: dict[str, Any]  # of a store, finished or not: what its extraction was told
    manifest: Manifest | None = None  # of a finished store

    def own_files(self) -> Iterator[Path]:
        """All that lies in it; without the folders of other splits, which that of a version 1 store may hold."""
        for path in self.folder.iterdir():
            if path.is_file():
                yield path
            elif path.name == "tokenizer" or path.name.startswith("."):
                yield from (inside for inside in path.rglob("*") if inside.is_file())


def find_splits(path: str, only: str | None = None, flag: str = "path") -> list[Split]:
    """What a folder holds: a split in each folder within it, or one in itself. `only` one of them, if given.

    Raises UserError where there is none, or where a manifest cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--{flag} {path}: no such folder; give one with features, which `uvit extract` makes")
    splits = [split for place in _places(folder) if (split := _look(place, folder, flag)) is not None]
    if not splits:
        part = f"is part of a folder in the old layout; give {folder.absolute().parent}"
        none = "holds no features (neither train/manifest.json nor train/0.npy); `uvit extract` makes them"
        raise UserError(f"--{flag} {path}: {part if (folder / '0.npy').is_file() else none}")
    if only is None:
        return splits
    chosen = [split for split in splits if split.name == only]
    if not chosen:
        there = ", ".join(split.name for split in splits)
        raise UserError(f"--split {only}: {path} has no such split; it has {there}")
    return chosen


def find_stores(path: str, only: str | None = None, flag: str = "path") -> list[tuple[Split, Manifest]]:
    """Like `find_splits`, but all must be finished stores."""
    stores = []
    for split in find_splits(path, only, flag):
        if split.manifest is None:
            wrong = {
                "unfinished": "was not finished; run the command that began it again",
                "old layout": "is in the old layout; `uvit features import` makes a store of it",
            }
            raise UserError(f"--{flag} {split.folder}: {wrong[split.kind]}")
        stores.append((split, split.manifest))
    return stores


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    yield from sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _look(place: Path, root: Path, flag: str) -> Split | None:
    if (place / "manifest.json").is_file():
        manifest = read_manifest(place, lambda what: UserError(f"--{flag} {place}: {what}"))
        name = manifest.split or "train" if place == root else place.name
        return Split(name, place, "store", manifest.fields, manifest)
    if (place / "settings.json").is_file():
        try:
            settings = json.loads((place / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"--{flag} {place}: settings.json cannot be read; extract it again") from None
        if isinstance(settings, dict) and "moments_shape" in settings:
            return Split(settings.get("split", "train") if place == root else place.name, place, "unfinished", settings)
    if place != root and (place / "0.npy").is_file():
        return Split(place.name, place, "old layout", {})
    return None
