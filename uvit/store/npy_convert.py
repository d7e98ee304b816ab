"""`uvit features import` and `export`: convert `.npy` features (U-ViT layout) to a feature store, and back.

`uvit.store.npy_layout` describes the layout. Shapes: T text tokens, D width of the text embeddings.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from uvit.config.store import FeaturesExportConfig, FeaturesImportConfig
from uvit.conventions import LatentSpace
from uvit.device import pick_device
from uvit.errors import UserError, differences
from uvit.io import file_sha256, format_bytes, read_json, write_bytes
from uvit.lock import LOCK, WriterLock
from uvit.progress import Progress
from uvit.sources.types import Problem
from uvit.store.npy_layout import EMPTY_CONTEXT, MARK, PREVIEW_PROMPTS, load_npy, num_captions
from uvit.store.reader import FeatureStore
from uvit.store.shard import EncodedPairs
from uvit.store.splits import Split, find_splits, find_stores
from uvit.store.writer import StoreInfo, StoreWriter
from uvit.weights.components import load_text_encoder, load_vae
from uvit.weights.encoders import (
    assume_latent_space,
    downsampling_of,
    encode_tokens,
    fingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
)

NUM_THREADS = 4  # small files take more time on the disk than in Python
PAIRS_AT_A_TIME = 64
DISK_BLOCK = 4096  # bytes; a file takes a multiple of it


# Import


def import_npy(config: FeaturesImportConfig) -> None:
    """The command `uvit features import`. Raises UserError unless there are `.npy` features that fit into a store."""
    root = Path(config.path).absolute()
    splits = [split for split in find_splits(config.path) if split.kind == "npy"]
    if not splits:
        raise UserError(f"--path {root}: is a feature store already; give a folder of .npy features (U-ViT layout)")
    if not (root / EMPTY_CONTEXT).is_file():
        raise UserError(
            f"--path {root}: has no {EMPTY_CONTEXT}, the text embedding of the empty caption; copy it there"
        )
    empty_context = load_npy(root / EMPTY_CONTEXT)
    moments, context = load_npy(splits[0].folder / "0.npy"), load_npy(splits[0].folder / "0_0.npy")
    for name, array, num_axes in (("0.npy", moments, 3), ("0_0.npy", context, 2), (EMPTY_CONTEXT, empty_context, 2)):
        if array.ndim != num_axes or not array.size or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(
                f"--path {root}: {name} contains {array.dtype} {array.shape}, but must have {num_axes} axes of finite"
                " numbers; make it again"
            )
    if empty_context.shape != context.shape:
        raise UserError(
            f"--path {root}: {EMPTY_CONTEXT} has shape {empty_context.shape}, but the other text embeddings have"
            f" {context.shape}; make it again"
        )
    dtype = config.dtype or np.result_type(moments, context).name
    if dtype not in ("float16", "float32"):
        raise UserError(f"--path {root}: its arrays are {dtype}; give --dtype float32 or --dtype float16")
    recorded = recorded_encoders(config, moments.shape, context.shape)
    if (root / PREVIEW_PROMPTS / "0.npy").is_file():
        print(f"not read: {PREVIEW_PROMPTS}/ (prompts of the official code's previews)")
    for split in splits:
        counts = num_captions(split.folder)
        info = StoreInfo(
            num_source_pairs=len(counts),
            shard_size=config.shard_size,
            dtype=dtype,
            moments_shape=moments.shape,
            flipped=False,
            context_shape=context.shape,
            num_tokens=context.shape[0],
            token_dtype=None,
            **asdict(recorded.latent_space),
            split=split.name,
            source={"source": str(root), "split": split.name, "layout": "old", "resolution": recorded.resolution},
            vae=recorded.vae,
            text_encoder=recorded.text_encoder,
            tokenizer=recorded.tokenizer,
        )
        writer = StoreWriter(Path(config.output_dir) / split.name, info)
        if not writer.complete:
            _import_pairs(split, counts, writer, config.disable_tqdm)
            writer.finish(_cast(empty_context, info, root / EMPTY_CONTEXT), None)
        print(f"{writer.folder}: {len(counts):,} pairs from {split.folder}.")


def _import_pairs(split: Split, counts: np.ndarray, writer: StoreWriter, disable_tqdm: bool) -> None:
    progress = Progress(f"import {split.name}", len(counts), "pair", bar=not disable_tqdm)
    with progress, ThreadPoolExecutor(NUM_THREADS) as pool:
        for number in range(-(-len(counts) // writer.info.shard_size)):
            rows = writer.rows(number)
            if writer.done(number):
                progress.skip(len(rows))
                continue
            with writer.open_shard(number) as shard:
                progress.skip(shard.next_row - rows.start)
                for start in range(shard.next_row, rows.stop, PAIRS_AT_A_TIME):
                    batch = range(start, min(start + PAIRS_AT_A_TIME, rows.stop))
                    pairs = list(pool.map(lambda i: _read_pair(split.folder, i, int(counts[i]), writer.info), batch))
                    shard.append(_encoded(batch, pairs, writer.info), next_row=batch.stop)
                    shard.commit()
                    progress.update(len(batch))
                shard.finish()


def _read_pair(folder: Path, row: int, count: int, info: StoreInfo) -> list[np.ndarray] | Problem:
    """Moments and `count` text embeddings; or the problem because of which the pair is skipped."""
    shapes = {f"{row}.npy": info.moments_shape} | {f"{row}_{k}.npy": info.context_shape for k in range(count)}
    arrays = []
    for name, shape in shapes.items():
        path = folder / name
        try:
            array = load_npy(path)
        except UserError as error:
            return Problem(str(row), "broken file", str(error).removeprefix("--path: "))
        if array.shape != shape or array.dtype.kind != "f":
            message = f"{path} contains {array.dtype} {array.shape}, but the others contain floats of shape {shape}"
            return Problem(str(row), "wrong shape", message)
        if not np.isfinite(array).all():
            return Problem(str(row), "not finite", f"{path} has values that are NaN or infinite")
        arrays.append(_cast(array, info, path))
    return arrays


def _cast(array: np.ndarray, info: StoreInfo, path: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = array.astype(info.dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"--dtype {info.dtype}: {path} has values beyond its range; give --dtype float32")
    return stored


def _encoded(rows: range, pairs: list[list[np.ndarray] | Problem], info: StoreInfo) -> EncodedPairs:
    kept = [(row, pair) for row, pair in zip(rows, pairs, strict=True) if not isinstance(pair, Problem)]
    contexts = [context for _, pair in kept for context in pair[1:]]
    return EncodedPairs(
        ids=[str(row) for row, _ in kept],
        captions=[()] * len(kept),
        moments=np.array([pair[0] for _, pair in kept], info.dtype).reshape(-1, *(info.moments_shape or ())),
        flipped=None,
        contexts=np.array(contexts, info.dtype).reshape(-1, *(info.context_shape or ())),
        token_ids=None,
        problems=tuple(pair for pair in pairs if isinstance(pair, Problem)),
        counts=[len(pair) - 1 for _, pair in kept],
    )


# Export


def export_npy(config: FeaturesExportConfig) -> None:
    """The command `uvit features export`. Raises UserError if there is no finished store, or too little disk space."""
    target = Path(config.output_dir).absolute()
    splits = [split for split, _ in find_stores(config.path, config.split)]
    with WriterLock(target / LOCK, f"--output_dir {config.output_dir}"), torch.inference_mode():
        exports = [_Export(split, target / split.name, config) for split in splits]
        for other in exports[1:]:
            if not np.array_equal(other.empty_context, exports[0].empty_context):
                raise UserError(
                    f"--path {config.path}: {exports[0].name} and {other.name} have different text embeddings of the"
                    " empty caption; export each to its own folder, with --split"
                )
        empty_context = _npy(exports[0].empty_context)
        if (target / EMPTY_CONTEXT).is_file() and (target / EMPTY_CONTEXT).read_bytes() != empty_context:
            raise UserError(
                f"--output_dir {target}: its {EMPTY_CONTEXT} is from another text encoder; choose another folder"
            )
        check_room(sum(one.bytes_to_write() for one in exports), target)
        for one in exports:
            one.run(config.disable_tqdm)
        _write(target / EMPTY_CONTEXT, empty_context)
    print(f"{target}: {', '.join(f'{one.num_pairs:,} pairs in {one.name}' for one in exports)}.")
    if any(split.settings.get("flipped") for split in splits):
        print("The mirrored images were not exported: .npy features (U-ViT layout) cannot hold them.")
    for latents in sorted({LatentSpace.recorded(split.settings).describe_latents() for split in splits}):
        print(
            f"Not exported: {latents}. Where the files are trained on or imported, name the VAE (--vae_name_or_path)."
        )


def check_room(needed: int, folder: Path) -> None:
    """Raises UserError if the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    print(f"{format_bytes(needed)} to write, {format_bytes(free)} free.")
    if needed > free:
        raise UserError(
            f"--output_dir {folder}: needs {format_bytes(needed)}, but its disk has {format_bytes(free)} free;"
            " choose another disk"
        )


class _Export:
    """The export of one split."""

    def __init__(self, split: Split, folder: Path, config: FeaturesExportConfig):
        self.name, self.source, self.folder = split.name, split.folder, folder
        store = FeatureStore(split.folder, flag="path")  # checks names, sizes and shapes
        if store.moments_shape is None:
            raise UserError(
                f"--path {split.folder}: holds images for a model on pixels, and .npy features (U-ViT layout) hold the"
                " moments of a VAE; train on the store itself"
            )
        self.shards = store.manifest["shards"]
        self.num_pairs, self.num_captions = store.num_samples, int(store.manifest["num_captions"])
        self.encode = None if store.context_shape else _encoder(store, config)
        if self.encode is None:
            empty = store.empty_context
        else:
            assert store.empty_token_ids is not None
            empty = self.encode(store.empty_token_ids[None])[0]
        assert empty is not None
        self.dtype = np.dtype(config.dtype)
        self.empty_context = empty.astype(self.dtype)
        self.sizes = {
            False: len(_npy(np.zeros(store.moments_shape, self.dtype))),
            True: len(_npy(self.empty_context)),
        }  # {is a text embedding: bytes of the file}
        manifest = file_sha256(split.folder / "manifest.json")
        self.mark = json.dumps({"manifest": manifest, "dtype": self.dtype.name}).encode()
        if folder.is_dir() and any(folder.iterdir()):
            mark = folder / MARK
            if not mark.is_file() or mark.read_bytes() != self.mark:
                changed = differences(read_json(mark), json.loads(self.mark)) if mark.is_file() else {}
                raise UserError(
                    f"--output_dir {folder}: contains something other than this export; choose another folder",
                    list(changed.values()),
                )

    def bytes_to_write(self) -> int:
        """The disk space for all files that do not exist yet."""
        num_written = [0, 0]
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            num_written["_" in entry.name] += entry.name[0] != "."
        blocks = {is_context: -(-num_bytes // DISK_BLOCK) * DISK_BLOCK for is_context, num_bytes in self.sizes.items()}
        return (self.num_pairs - num_written[0]) * blocks[False] + (self.num_captions - num_written[1]) * blocks[True]

    def run(self, disable_tqdm: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / MARK, self.mark)
        progress = Progress(f"export {self.name}", self.num_pairs, "pair", bar=not disable_tqdm)
        with progress, ThreadPoolExecutor(NUM_THREADS) as pool:
            row = 0
            for moments, captions, counts in self._blocks():
                names = [f"{row + i}.npy" for i in range(len(counts))]
                names += [f"{row + i}_{k}.npy" for i, count in enumerate(counts) for k in range(count)]
                if not all(map(self._is_complete, names)):
                    contexts = captions if self.encode is None else self.encode(captions)
                    arrays = [array.astype(self.dtype) for array in (*moments, *contexts)]
                    list(pool.map(lambda name, array: _write(self.folder / name, _npy(array)), names, arrays))
                row += len(counts)
                progress.update(len(counts))

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(moments, text embeddings or token ids, counts) of a few pairs at a time, in order."""
        for number, shard in enumerate(self.shards):
            if not shard["rows"]:
                continue
            moments, captions, counts = (
                np.load(self.source / f"{kind}-{number:05d}.npy", mmap_mode="r", allow_pickle=False)
                for kind in ("moments", "contexts" if self.encode is None else "tokens", "counts")
            )
            ends = np.cumsum(counts)
            for start in range(0, len(counts), PAIRS_AT_A_TIME):
                here = slice(start, start + PAIRS_AT_A_TIME)
                yield moments[here], captions[ends[start] - counts[start] : ends[here][-1]], counts[here]

    def _is_complete(self, name: str) -> bool:
        try:
            return os.stat(self.folder / name).st_size == self.sizes["_" in name]  # noqa: PTH116 - faster
        except OSError:
            return False


def _encoder(store: FeatureStore, config: FeaturesExportConfig) -> Callable[[np.ndarray], np.ndarray]:
    """The function token ids (c, T) -> text embeddings (c, T, D), for a store that has only token ids."""
    name = config.text_encoder_name_or_path or store.text_encoder_name
    if name is None or store.tokenizer_name is None:
        raise UserError(
            f"--path {store.folder}: stores only token ids and records no text encoder, but .npy features need text"
            " embeddings; give --text_encoder_name_or_path"
        )
    device = pick_device(config.device)
    text_encoder = load_text_encoder(name).to(device)
    if not config.text_encoder_name_or_path and store.text_encoder_sha256 not in (None, fingerprint(text_encoder)):
        raise UserError(
            f"--path {store.folder}: the text encoder at {name} has other weights than the recorded one; give"
            " --text_encoder_name_or_path to use it anyway, or to use another"
        )
    tokenizer = load_tokenizer(store.tokenizer_name)
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise UserError(
            f"--text_encoder_name_or_path {name}: has a vocabulary of {text_encoder.config.vocab_size:,} tokens, but"
            f" the store's tokenizer has {len(tokenizer):,}; give the text encoder that belongs to it"
        )

    def encode(token_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(device)
        return encode_tokens(text_encoder, ids, tokenizer.pad_token_id).float().cpu().numpy()

    return encode


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, without syncing it: that would take hours for 500,000 files.

    A rerun checks their sizes instead.
    """
    write_bytes(path, data, sync=False)


# Encoders: .npy features do not record them, so flags name them


Encoder = dict[str, str]  # {"name", "sha256"}


@dataclass(frozen=True)
class Recorded:
    """The encoders that flags name. None: not given."""

    vae: Encoder | None
    text_encoder: Encoder | None
    tokenizer: Encoder | None
    latent_space: LatentSpace
    resolution: int | None  # side of the images in pixels; None: not known


def recorded_encoders(
    config: FeaturesImportConfig, moments_shape: tuple[int, ...], context_shape: tuple[int, ...]
) -> Recorded:
    """The encoders that the flags name, with their fingerprints. Raises UserError if one does not fit the features."""
    vae = text_encoder = tokenizer = resolution = model = None
    if config.vae_name_or_path:
        model = load_vae(config.vae_name_or_path)
        if 2 * model.config["latent_channels"] != moments_shape[0]:
            raise UserError(
                f"--vae_name_or_path {config.vae_name_or_path}: has {model.config['latent_channels']} latent channels,"
                f" but moments of shape {moments_shape} need {moments_shape[0] // 2}; give the VAE that made them"
            )
        vae = _record(config.vae_name_or_path, fingerprint(model))
        resolution = moments_shape[1] * downsampling_of(model)
    latent_space = assume_latent_space(model, config.vae_name_or_path, config.latent_scale)
    if config.text_encoder_name_or_path:
        model = load_text_encoder(config.text_encoder_name_or_path)
        if model.config.hidden_size != context_shape[1]:
            raise UserError(
                f"--text_encoder_name_or_path {config.text_encoder_name_or_path}: has width {model.config.hidden_size},"
                f" but the text embeddings have shape {context_shape}; give the text encoder that made them"
            )
        text_encoder = _record(config.text_encoder_name_or_path, fingerprint(model))
    if name := config.tokenizer_name or config.text_encoder_name_or_path:
        tokenizer = _record(name, tokenizer_fingerprint(load_tokenizer(name)))
    return Recorded(vae, text_encoder, tokenizer, latent_space, resolution)


def _record(name_or_path: str, sha256: str) -> Encoder:
    """Local folders as absolute paths; Hub ids and built-in names as they are."""
    path = Path(name_or_path)
    return {"name": str(path.resolve()) if path.exists() else name_or_path, "sha256": sha256}
