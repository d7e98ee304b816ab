"""Write a feature store. Any process can write any shard, and the work can be stopped and resumed at any point.

`settings.json` keeps the settings of the extraction. A process that resumes or joins it must have the same settings.
The shards are independent of one another: `uvit.store.shard` writes them. The manifest is written last.
"""

import contextlib
import fcntl
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from uvit.conventions import LatentSpace, PerChannel
from uvit.errors import UserError, differences
from uvit.io import read_json, write_bytes, write_json, write_json_once
from uvit.store.manifest import LATENTS_VERSION, STORE_FORMAT, VERSION, with_image_settings
from uvit.store.shard import ArrayInfo, ShardWriter, committed_row, file_records, read_record, record_name

INDEX_SHA256 = "index_sha256"  # in `source`: of the index that the source had


@dataclass(frozen=True)
class StoreInfo:
    """How the features were made: the first part of the manifest."""

    num_source_pairs: int | None  # None: not known in advance
    shard_size: int  # source pairs per shard, except the last; skipped pairs count too
    dtype: str  # of moments and text embeddings: float16 or float32
    moments_shape: tuple[int, ...] | None  # (2 C, h, w)
    flipped: bool  # the moments of the mirrored images are stored too; images are mirrored when they are read
    context_shape: tuple[int, ...] | None  # (T, D); None: text embeddings are not stored
    num_tokens: int  # T
    token_dtype: str | None  # uint16 or int32; None: token ids are not stored
    latent_scale: float
    split: str
    source: dict[str, Any]  # where the pairs came from, and how their images were prepared
    vae: dict[str, str] | None  # {"name": folder or hub id, "sha256": fingerprint}
    text_encoder: dict[str, str] | None
    tokenizer: dict[str, str] | None
    latent_shift: PerChannel = 0.0  # with latent_scale, a LatentSpace
    latent_std: PerChannel = 1.0
    latents: str = "vae"
    images_shape: tuple[int, ...] | None = None  # (3, H, W), in place of moments; see PIXELS of `uvit.conventions`
    teacher: dict[str, str] | None = None  # the vision model whose features are stored too
    teacher_shape: tuple[int, ...] | None = None  # (C, h, w)

    def arrays(self) -> dict[str, ArrayInfo]:
        """The arrays of a shard, by kind."""
        dtype = np.dtype(self.dtype)
        arrays = {}
        if self.images_shape:
            arrays["images"] = ArrayInfo(self.images_shape, np.dtype(np.uint8))
        if self.moments_shape:
            arrays["moments"] = ArrayInfo(self.moments_shape, dtype)
            if self.flipped:
                arrays["flipped"] = arrays["moments"]
        if self.teacher_shape:
            arrays["teacher"] = ArrayInfo(self.teacher_shape, np.dtype(np.float16))
        if self.context_shape:
            arrays["contexts"] = ArrayInfo(self.context_shape, dtype, per_caption=True)
        if self.token_dtype:
            arrays["tokens"] = ArrayInfo((self.num_tokens,), np.dtype(self.token_dtype), per_caption=True)
        return {**arrays, "counts": ArrayInfo((), np.dtype(np.int32))}


class StoreWriter:
    """Writes one split into a folder of that name.

    Raises UserError if the folder contains anything but this extraction, finished or not.
    """

    def __init__(self, folder: Path, info: StoreInfo):
        self.folder, self.info = folder, info
        refuse_earlier_layouts(folder)
        settings = json.loads(json.dumps(asdict(info)))  # as it reads back: tuples are lists
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if not path.is_file():
            has_other_files = any(not entry.name.startswith(".") for entry in folder.iterdir())
            if has_other_files and not path.is_file():  # another process may have started in the meantime
                raise UserError(f"--output_dir {folder}: is not empty and no feature store; choose another folder")
            write_json_once(path, settings, indent=1)
        before = read_record(path)
        source = before.get("source", {})
        # Not recorded: an earlier version began it.
        if unrecorded := (with_image_settings(source).keys() - source.keys()) & info.source.keys():
            now = {"icc": "ignore", "crop_before_resize": "partly"}
            self.info = replace(info, source=info.source | {key: now[key] for key in unrecorded})
            settings["source"] = {key: value for key, value in settings["source"].items() if key not in unrecorded}
            if not self.complete:
                print(
                    f"Warning: {folder} was started by an earlier version, whose resize also read pixels beside the"
                    " crop; the remaining images are cropped first, and colour profiles stay ignored. To prepare all"
                    " images alike, extract into another folder."
                )
        if INDEX_SHA256 not in source:
            self.info.source.pop(INDEX_SHA256, None)
            settings["source"].pop(INDEX_SHA256, None)
        before |= asdict(LatentSpace.recorded(before))  # an older one has a latent scale alone
        if changed := differences(before, settings | asdict(LatentSpace.recorded(settings))):
            has_changed = changed.pop(f"source.{INDEX_SHA256}", None)
            if has_changed and not changed:
                raise UserError(
                    f"--output_dir {folder}: the source has changed since it was started (other images, captions or "
                    "files); extract into another folder, or restore the source to resume"
                )
            raise UserError(
                f"--output_dir {folder}: was started with other settings; give the same settings to resume, or another"
                " folder",
                list(changed.values()),
            )

    @property
    def complete(self) -> bool:
        """Whether there is a manifest. One that cannot be read is written again."""
        try:
            return isinstance(read_json(self.folder / "manifest.json"), dict)
        except (OSError, ValueError):
            return False

    @property
    def num_source_pairs(self) -> int | None:
        """None: not known yet, because no process has reached the end of the source."""
        if self.info.num_source_pairs is not None:
            return self.info.num_source_pairs
        end = self.folder / "stream-end.json"
        return read_record(end)["num_source_pairs"] if end.is_file() else None

    @property
    def num_shards(self) -> int | None:
        """None: not known yet."""
        pairs = self.num_source_pairs
        return None if pairs is None else -(-pairs // self.info.shard_size)

    def rows(self, shard: int) -> range:
        """The source rows of a shard. While the source's length is not known, no shard is cut short."""
        start, pairs = shard * self.info.shard_size, self.num_source_pairs
        stop = start + self.info.shard_size
        return range(start, stop if pairs is None else min(stop, pairs))

    def done(self, shard: int) -> bool:
        return (self.folder / record_name(shard)).is_file()

    def next_row(self, shard: int) -> int:
        """The first source row of a shard that is not yet processed and committed."""
        rows = self.rows(shard)
        if self.done(shard):
            return rows.stop
        row = committed_row(self.folder, shard, rows)
        return rows.start if row is None else row

    def open_shard(self, shard: int) -> ShardWriter:
        """A context manager that writes a shard. It resumes after the last commit."""
        return ShardWriter(self.folder, shard, self.rows, self.info.arrays())

    def end_stream(self, num_source_pairs: int) -> None:
        """Record the number of pairs that the source turned out to have. Raises UserError if it was another before."""
        write_json_once(self.folder / "stream-end.json", {"num_source_pairs": num_source_pairs}, indent=1)
        if self.num_source_pairs != num_source_pairs:
            raise UserError(
                f"--output_dir {self.folder}: the source had {self.num_source_pairs} pairs before and now has"
                f" {num_source_pairs}; give the same source, or another folder"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of this store. Waits for other processes that hold it."""
        with (self.folder / "settings.json").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finish(
        self, empty_context: np.ndarray | None, empty_token_ids: np.ndarray | None, num_shards: int | None = None
    ) -> None:
        """Complete the store once all shards are done: write the empty caption's features, the problems, the manifest.

        `empty_context` is (T, D), `empty_token_ids` (T,). Raises UserError if the store has no pairs.
        """
        number = self.num_shards if num_shards is None else num_shards
        assert number is not None, "the end of the source is not known"
        shards = [read_record(self.folder / record_name(shard)) for shard in range(number)]
        with self.lock():
            if not self.complete:
                self._finish(shards, empty_context, empty_token_ids)
            for path in self.folder.glob(".*"):  # left by processes that were killed
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _finish(
        self, shards: list[dict[str, Any]], empty_context: np.ndarray | None, empty_token_ids: np.ndarray | None
    ) -> None:
        files = []
        problems = [problem for shard in shards for problem in shard.pop("problems")]
        if problems:
            lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
            write_bytes(self.folder / "problems.jsonl", "".join(lines).encode())
            files.append(self.folder / "problems.jsonl")
        # None: an earlier version wrote a shard, or the captions were not tokenized here.
        truncated = [shard.get("truncated_captions") for shard in shards]
        num_pairs = sum(shard["rows"] for shard in shards)
        num_left_out = sum(problem["left_out"] for problem in problems)
        if not num_pairs:
            raise UserError(
                f"--source: all {num_left_out:,} pairs were skipped; {self.folder / 'problems.jsonl'} says why"
                if problems
                else "--source: contains no pairs"
            )
        for name, array in (("empty_context.npy", empty_context), ("empty_tokens.npy", empty_token_ids)):
            if array is not None:
                write_bytes(self.folder / name, _npy(array))
                files.append(self.folder / name)
        files += sorted(path for path in (self.folder / "tokenizer").glob("*") if path.is_file())
        manifest = {
            "format": STORE_FORMAT,
            "version": VERSION if self.info.images_shape else LATENTS_VERSION,
            **asdict(self.info),
            "num_pairs": num_pairs,
            "num_captions": sum(shard["captions"] for shard in shards),
            "num_truncated_captions": None if None in truncated else sum(filter(None, truncated)),
            "problems": dict(sorted(Counter(problem["kind"] for problem in problems).items())),
            "num_left_out": num_left_out,
            "files": file_records(files, self.folder),
            "shards": shards,
        }
        write_json(self.folder / "manifest.json", manifest, indent=1)


def refuse_earlier_layouts(folder: Path) -> None:
    """Raises UserError if the folder of a split lies in a store of version 1, or among `.npy` features."""
    root = folder.parent
    for name in ("manifest.json", "settings.json"):
        if (root / name).is_file():
            raise UserError(
                f"--output_dir {root}: contains a feature store of version 1, which has no splits; choose another"
                " folder (training still reads the old one)"
            )
    if (folder / "0.npy").is_file() or (root / "empty_context.npy").is_file():
        raise UserError(
            f"--output_dir {root}: contains .npy features (U-ViT layout); choose another folder (training still reads"
            " this one)"
        )


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()
