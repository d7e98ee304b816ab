"""`uvit extract`: read pairs, encode them, and write a feature store.

Worker processes decode images, threads encode them, and one thread writes. Batches pass through these stages in order.
Written features are committed every few seconds, so a kill loses only those seconds. A resumed extraction writes the
same bytes as an uninterrupted one. Several processes can share the shards without communication: the files in the
folder tell each process what remains.
"""

import contextlib
import errno
import json
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvit.config.extract import ExtractConfig
from uvit.config.sharding import resolve_shard
from uvit.conventions import PIXELS
from uvit.device import pick_device, slow_precision
from uvit.errors import UserError
from uvit.extract.encode import Encoders, encode_in_order, encoding_threads
from uvit.extract.provenance import absolute_name, describe_store, find_tokenizer, scale_reason
from uvit.extract.teacher import load_teacher
from uvit.extract.tokenizer import save_tokenizer
from uvit.extract.workers import Decoded, Preprocessing, ShardPlan, decode_batches
from uvit.io import format_bytes, read_json
from uvit.progress import Progress
from uvit.sources.open import open_given
from uvit.sources.types import PairError, Problem, RandomAccessSource, Source
from uvit.store.shard import EncodedPairs, ShardWriter
from uvit.store.writer import StoreWriter, refuse_earlier_layouts
from uvit.weights.components import load_text_encoder, load_vae
from uvit.weights.encoders import downsampling_of, highest_token_id, latent_space_of, num_positions

COMMIT_SECONDS = 2.0  # between two commits, at least: a commit waits for the disk


def extract(config: ExtractConfig) -> None:
    """The command `uvit extract`. Raises UserError if something cannot be read, encoded or written."""
    part, num_parts = resolve_shard(config.shard)
    folder = Path(config.output_dir) / config.split
    refuse_earlier_layouts(folder)
    source = open_given(config, config.resolution, config.streaming)
    report_index_problems(config, source)
    with extraction_errors(config):
        vae, text_encoder = load_encoders(config)
        teacher = load_teacher(config.teacher, absolute_name(config.teacher)) if config.teacher else None
        tokenizer, tokenizer_record = find_tokenizer(config, source, folder)
        check_tokenizer(config, tokenizer, text_encoder)
        latent_space = PIXELS if vae is None else latent_space_of(vae)
        if config.latent_scale is not None:
            latent_space = replace(latent_space, latent_scale=config.latent_scale)
        described = latent_space.describe_latents().capitalize()
        print(f"{described}: {scale_reason(config, vae, latent_space)}.")
        info = describe_store(config, source, vae, text_encoder, tokenizer, tokenizer_record, latent_space, teacher)
        writer = StoreWriter(folder, info)
        if writer.complete:
            print_summary(folder)
            return
        if info.token_dtype:
            with writer.lock():
                if not (folder / "tokenizer").is_dir():  # `settings.json` names an existing one
                    save_tokenizer(tokenizer, folder / "tokenizer")
        check_disk(source, writer)
        device = pick_device(config.device)
        precision = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
        for sentence in slow_precision("--bf16" if config.bf16 else "--fp16", device, precision):
            print(f"warning: {sentence}")
        encoders = Encoders(
            vae=vae.to(device) if vae else None,
            text_encoder=text_encoder.to(device) if info.context_shape else None,
            tokenizer=tokenizer,
            device=device,
            precision=precision,
            num_tokens=config.model_max_length,
            batch_size=config.batch_size,
            flip=config.random_flip,
            dtype=np.dtype(config.dtype),
            token_dtype=np.dtype(info.token_dtype) if info.token_dtype else None,
            skip=config.on_error == "skip",
            teacher=teacher.to(device) if teacher else None,
        )
        started = {int(path.stem[-5:]) for name in ("shard-*.json", ".partial-*") for path in folder.glob(name)}
        next_rows = {shard: writer.next_row(shard) for shard in started}
        encode_all(
            config,
            source,
            writer,
            ShardPlan(config.shard_size, config.batch_size, part, num_parts, next_rows),
            encoders,
        )


def encode_all(config: ExtractConfig, source: Source, writer: StoreWriter, plan: ShardPlan, encoders: Encoders) -> None:
    """Extract all shards of this process. The process that writes the last shard completes the store."""
    icc = writer.info.source["icc"]  # not that of the flag where an earlier version began the store
    preprocessing = Preprocessing(
        config.resolution, config.crop, config.resize, icc, config.min_image_size, encoders.skip
    )
    all_done = writer.num_shards is not None and all(map(writer.done, plan.shards(writer.num_shards)))
    no_batches = (batch for batch in list[Decoded]())
    decoded = no_batches if all_done else decode_batches(source, plan, preprocessing, config.num_workers)
    total = plan.num_rows(len(source)) if isinstance(source, RandomAccessSource) else None
    done = plan.num_rows_done()
    if done:
        print(f"Resuming after {done:,} of {f'{total:,}' if total is not None else '?'} pairs.")
    progress = Progress("extract", total, "pair", done=done, bar=not config.disable_tqdm)
    with contextlib.closing(decoded), sigterm_as_exit(), encoding_threads(encoders.device) as (pool, threads):
        empty = encoders.empty()  # first, because it shows what the text encoder cannot do
        try:
            write_all(writer, encode_in_order(encoders, decoded, pool, threads), progress)
        except (KeyboardInterrupt, SystemExit):
            progress.close()
            print(f"Stopped after {progress.done:,.0f} pairs; run the same command to resume.")
            raise
        finally:
            progress.close()
        assert writer.num_shards is not None
        for shard in plan.shards(writer.num_shards):
            if not writer.done(shard):  # its rows were all processed before, or the stream ended in it
                with writer.open_shard(shard) as opened:
                    opened.finish()
        remaining = sum(not writer.done(shard) for shard in range(writer.num_shards))
        if remaining:
            print(
                f"This process has written its shards. The other processes still have to write {remaining} of"
                f" {writer.num_shards}; the last one completes the store."
            )
            return
        writer.finish(*empty)
    print_summary(writer.folder)


def write_all(writer: StoreWriter, encoded: Iterator[tuple[Decoded, EncodedPairs]], progress: Progress) -> None:
    """Write batches in a separate thread. Whatever stops this, all data in the files is committed."""
    with ShardAppender(writer) as appender, ThreadPoolExecutor(1, "write") as writer_thread:
        in_progress = deque[tuple[Decoded, Future[None]]]()

        def wait_for_one() -> None:
            batch, written = in_progress.popleft()
            written.result()
            progress.update(len(batch.rows))

        for batch, pairs in encoded:
            if batch.num_source_pairs is not None:
                in_progress.append((batch, writer_thread.submit(writer.end_stream, batch.num_source_pairs)))
            else:
                in_progress.append((batch, writer_thread.submit(appender.append, batch.rows, pairs)))
            if len(in_progress) > 2:
                wait_for_one()
        while in_progress:
            wait_for_one()


class ShardAppender:
    """Appends batches to their shards. Keeps one shard open at a time."""

    def __init__(self, writer: StoreWriter):
        self.writer = writer
        self._shard: ShardWriter | None = None
        self._committed = time.monotonic()

    def append(self, rows: range, part: EncodedPairs) -> None:
        number = rows.start // self.writer.info.shard_size
        if self._shard is None or self._shard.number != number:
            self.__exit__(None, None, None)
            self._shard = self.writer.open_shard(number).__enter__()
        if self._shard.next_row != rows.start:
            raise UserError(
                f"--output_dir {self.writer.folder}: another process has written to shard {number} in the meantime;"
                " give each process its own shards, such as --shard 0/2 and --shard 1/2"
            )
        self._shard.append(part, rows.stop)
        if rows.stop == self.writer.rows(number).stop:
            self._shard.finish()
            self.__exit__(None, None, None)
        elif time.monotonic() - self._committed >= COMMIT_SECONDS:
            self._shard.commit()
            self._committed = time.monotonic()

    def __enter__(self) -> "ShardAppender":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shard, self._shard = self._shard, None
        if shard:
            shard.__exit__(kind, error, trace)


# Preparation


def report_index_problems(config: ExtractConfig, source: Source) -> None:
    """Print the problems that the index shows, before any model is loaded. Raises UserError with --on_error stop."""
    problems = source.problems() if isinstance(source, RandomAccessSource) else []
    if not problems:
        return
    if config.on_error == "stop":
        raise UserError(
            f"{problems[0].message} (the first of {len(problems):,} problems); --on_error skip skips such pairs"
        )
    print(f"Problems in the index: {by_kind(problems)}; unusable pairs are skipped.")


def load_encoders(config: ExtractConfig) -> tuple[Any, Any]:
    """(VAE or None, text encoder or None). Raises UserError if the flags about their inputs do not fit them."""
    vae = load_image_encoder(config)
    if not config.text_encoder_name_or_path:
        return vae, None
    text_encoder = load_text_encoder(config.text_encoder_name_or_path)
    positions = num_positions(text_encoder)
    if positions is not None and config.model_max_length > positions:
        raise UserError(f"--model_max_length {config.model_max_length}: the text encoder supports {positions} at most")
    return vae, text_encoder


def load_image_encoder(config: ExtractConfig) -> Any:
    """The VAE. None: the pixels are stored. Raises UserError if --resolution does not fit it."""
    if config.vae_name_or_path is None:
        return None
    vae = load_vae(config.vae_name_or_path)
    if (channels := vae.config["in_channels"]) != 3:
        raise UserError(
            f"--vae_name_or_path {config.vae_name_or_path}: encodes images of {channels} channels, but they have 3"
            " (RGB); give another VAE"
        )
    factor = downsampling_of(vae)
    if config.resolution % factor:
        raise UserError(
            f"--resolution {config.resolution}: must be a multiple of {factor}, the downsampling factor of the VAE"
        )
    return vae


def check_tokenizer(config: ExtractConfig, tokenizer: Any, text_encoder: Any) -> None:
    """Raises UserError if a caption's ids do not fit the text encoder (None: there is none) or --model_max_length."""
    if config.model_max_length <= (num_special := tokenizer.num_special_tokens_to_add()):
        raise UserError(
            f"--model_max_length {config.model_max_length}: leaves no room for words, because the tokenizer adds"
            f" {num_special} special tokens to each caption; give {num_special + 1} or more"
        )
    if text_encoder is None:
        return
    highest, size = highest_token_id(tokenizer), text_encoder.get_input_embeddings().num_embeddings
    if highest >= size:
        name = config.text_encoder_name_or_path
        flag = f"--tokenizer_name {config.tokenizer_name}" if config.tokenizer_name else "its tokenizer"
        raise UserError(
            f"--text_encoder_name_or_path {name}: has embeddings for the token ids 0 to {size - 1}, but {flag} has ids"
            f" up to {highest}; give the tokenizer that belongs to the text encoder as --tokenizer_name"
        )


# Errors and signals


@contextlib.contextmanager
def extraction_errors(config: ExtractConfig) -> Iterator[None]:
    """Turn a full disk and a killed worker into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"--output_dir {config.output_dir}: its disk is full; free some space and run the same command to resume"
        ) from None
    except RuntimeError as error:  # the DataLoader raises it at any point of the main thread
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"--num_workers {config.num_workers}: a worker process was killed, perhaps because the machine ran out of"
            " memory; run the same command to resume, with fewer workers or a smaller --batch_size"
        ) from None


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM end the process like Ctrl-C, with everything committed. The exit status is 128 + 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# The summary


def print_summary(folder: Path) -> None:
    """Print the size of a store, and what became of every pair of the source: the numbers add up."""
    manifest = read_json(folder / "manifest.json")
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder} is complete: {manifest['num_pairs']:,} pairs, {format_bytes(on_disk)}.")
    if (num_truncated := manifest.get("num_truncated_captions")) is not None:
        num_captions = manifest["num_captions"]
        share = f"{num_truncated:,} of {num_captions:,} captions ({num_truncated / max(1, num_captions):.2%})"
        print(f"{share} have more than --model_max_length {manifest['num_tokens']} tokens, and were cut there.")
    path = folder / "problems.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if manifest["problems"] else []
    problems = [Problem(**json.loads(line)) for line in lines]
    skipped = [problem for problem in problems if problem.left_out]
    partial = [problem for problem in problems if not problem.left_out]
    found = manifest["num_pairs"] + len(skipped)
    text = f"{found:,} {'pair' if found == 1 else 'pairs'} found: {manifest['num_pairs']:,} stored"
    text += f", {len(skipped):,} skipped"
    if skipped:
        text += f" ({by_kind(skipped)})"
    if partial:
        text += f"; also {by_kind(partial)}"
    print(text + (f". See {path}." if problems else "."))


# Estimates: the disk space before an extraction, and the remaining time while it runs


NUM_SAMPLED_PAIRS = 1000  # whose captions are counted


def check_disk(source: Source, writer: StoreWriter) -> None:
    """Print the number of pairs and the disk space for them. Raises UserError if the disk has too little."""
    free = shutil.disk_usage(writer.folder).free
    arrays = writer.info.arrays().values()
    per_pair, per_caption = (
        sum(array.dtype.itemsize * int(np.prod(array.shape)) for array in arrays if array.per_caption == kind)
        for kind in (False, True)
    )
    if not isinstance(source, RandomAccessSource):
        print(
            f"Stream of unknown length: {format_bytes(per_pair)} per pair and {format_bytes(per_caption)} per caption"
            f" to write, {format_bytes(free)} free in {writer.folder}."
        )
        return
    rows = np.unique(np.linspace(0, len(source) - 1, min(NUM_SAMPLED_PAIRS, len(source))).round().astype(int)).tolist()
    captions = list[tuple[str, ...]]()
    for row in rows:
        try:
            captions.append(source.captions(row))
        except PairError:
            captions.append(())
    id = "an id of the usual"  # length
    lines = sum(len(json.dumps({"id": id, "captions": each}, ensure_ascii=False).encode()) + 1 for each in captions)
    num_captions = round(len(source) * sum(map(len, captions)) / max(1, len(rows)))
    total = len(source) * (per_pair + lines // max(1, len(rows))) + num_captions * per_caption
    shards = (path for path in writer.folder.rglob("*-[0-9]*") if path.is_file())  # no settings, no tokenizer
    written = sum(path.stat().st_size for path in shards)
    needed = max(0, total - written)
    about = "about " if len(rows) < len(source) else ""
    print(
        f"{len(source):,} pairs, {about}{num_captions:,} captions: {format_bytes(needed)} to write,"
        f" {format_bytes(free)} free in {writer.folder}."
    )
    if needed > free:
        raise UserError(
            f"--output_dir {writer.folder}: needs {format_bytes(needed)}, but its disk has {format_bytes(free)} free;"
            " choose another disk, or store less"
        )


def by_kind(problems: Iterable[Problem]) -> str:
    """`3 broken image, 1 no caption`."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
