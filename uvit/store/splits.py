"""Find the splits in a folder of features: finished stores, unfinished stores, and `.npy` features."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uvit.errors import UserError
from uvit.store.manifest import Manifest, read_manifest
from uvit.store.npy_layout import PREVIEW_PROMPTS


@dataclass(frozen=True)
class Split:
    """A folder with the features of one split."""

    name: str
    folder: Path
    kind: Literal["store", "unfinished", "npy"]
    settings: dict[str, Any]  # of a store, finished or not: how it was made
    manifest: Manifest | None = None  # of a finished store

    def own_files(self) -> Iterator[Path]:
        """All files of this split. A store of version 1 may contain folders of other splits: those are not listed."""
        for path in self.folder.iterdir():
            if path.is_file():
                yield path
            elif path.name == "tokenizer" or path.name.startswith("."):
                yield from (inside for inside in path.rglob("*") if inside.is_file())


def find_splits(path: str, only: str | None = None, flag: str = "path") -> list[Split]:
    """The splits of a folder: the folder itself, or the folders in it. With `only`, the split of that name.

    Raises UserError if there is none, or if a manifest cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--{flag} {path}: no such folder; give a folder of features, which `uvit extract` writes")
    splits = [split for each in _candidates(folder) if (split := _open_split(each, folder, flag)) is not None]
    if not splits:
        if (folder / "0.npy").is_file():
            raise UserError(f"--{flag} {path}: is one split of .npy features; give {folder.absolute().parent}")
        raise UserError(
            f"--{flag} {path}: contains no features (no train/manifest.json or train/0.npy); make some with"
            " `uvit extract`"
        )
    if only is None:
        return splits
    chosen = [split for split in splits if split.name == only]
    if not chosen:
        names = ", ".join(split.name for split in splits)
        raise UserError(f"--split {only}: {path} has no such split; it has {names}")
    return chosen


def find_stores(path: str, only: str | None = None, flag: str = "path") -> list[tuple[Split, Manifest]]:
    """Like `find_splits`. Raises UserError unless all of them are finished stores."""
    stores = []
    for split in find_splits(path, only, flag):
        if split.manifest is None:
            problem = {
                "unfinished": "is not finished; run the command that started it again",
                "npy": "contains .npy features; `uvit features import` converts them to a feature store",
            }
            raise UserError(f"--{flag} {split.folder}: {problem[split.kind]}")
        stores.append((split, split.manifest))
    return stores


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    yield from sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _open_split(folder: Path, root: Path, flag: str) -> Split | None:
    """The split in a folder, which is `root` or lies in it. None: there is no split."""
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder, lambda what: UserError(f"--{flag} {folder}: {what}"))
        name = manifest.split or "train" if folder == root else folder.name
        return Split(name, folder, "store", manifest.fields, manifest)
    if (folder / "settings.json").is_file():
        try:
            settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"--{flag} {folder}: settings.json cannot be read; extract it again") from None
        if isinstance(settings, dict) and "moments_shape" in settings:
            name = settings.get("split", "train") if folder == root else folder.name
            return Split(name, folder, "unfinished", settings)
    if folder != root and folder.name != PREVIEW_PROMPTS and (folder / "0.npy").is_file():
        return Split(folder.name, folder, "npy", {})
    return None
