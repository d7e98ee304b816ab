"""`uvit extract`: pairs -> feature store.

Worker processes decode images while the encoders run; batches never cross shards, so that an extraction
stopped and gone on with writes the same bytes as one that was not.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from uvit.config.extract import ExtractConfig
from uvit.data.encoders import (
    downsampling_of,
    encode_images,
    encode_tokens,
    fingerprint,
    latent_scale_of,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    tokenize,
)
from uvit.data.loader import leave_stopping_to_the_main_process
from uvit.data.sources import Source, captions_of, open_source
from uvit.data.store import EncodedPairs, StoreInfo, StoreWriter
from uvit.data.tokenizer import save_tokenizer, train_tokenizer
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.images import to_pixels, to_unit


@dataclass(frozen=True)
class Encoders:
    """What pairs are encoded with; no text encoder where contexts are not wanted."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    device: torch.device
    num_tokens: int
    batch_size: int
    dtype: np.dtype  # of moments and contexts
    token_dtype: np.dtype | None  # None: token ids are not wanted

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, R, R) uint8 -> moments (B, 2 C, h, w)."""
        return self._stored(encode_images(self.vae, to_unit(pixels).to(self.device)), "moments")

    def captions(self, captions: list[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """c captions -> contexts (c, T, D), token ids (c, T); None for what is not wanted."""
        token_ids = tokenize(self.tokenizer, captions, self.num_tokens)
        contexts = None
        if self.text_encoder is not None:
            parts = [
                encode_tokens(self.text_encoder, part.to(self.device), self.tokenizer.pad_token_id)
                for part in token_ids.split(self.batch_size)
            ]
            contexts = self._stored(torch.cat(parts), "contexts")
        return contexts, token_ids.numpy().astype(self.token_dtype) if self.token_dtype is not None else None

    def pairs(self, batch: "Decoded") -> EncodedPairs:
        contexts, token_ids = self.captions([caption for captions in batch.captions for caption in captions])
        return EncodedPairs(batch.ids, batch.captions, self.images(batch.pixels), contexts, token_ids)

    def _stored(self, features: Tensor, what: str) -> np.ndarray:
        stored = features.to(getattr(torch, self.dtype.name))
        if not torch.isfinite(stored).all():
            reason = "give --dtype float32" if torch.isfinite(features).all() else "the encoder itself gives them"
            raise UserError(f"--dtype {self.dtype.name}: some {what} come out infinite or not a number; {reason}")
        return stored.cpu().numpy()


@torch.inference_mode()
def extract(config: ExtractConfig) -> None:
    """The command `uvit extract`. Raises UserError for what cannot be read, encoded or written."""
    source = open_source(config.source, config.split, config.image_folder, config.resolution)
    vae = load_vae(config.vae_name_or_path)
    factor = downsampling_of(vae)
    if config.resolution % factor:
        raise UserError(
            f"--resolution {config.resolution}: must be a multiple of {factor}, by which the VAE scales down"
        )
    text_encoder: Any = None
    if config.text != "tokens" and config.text_encoder_name_or_path:
        text_encoder = load_text_encoder(config.text_encoder_name_or_path)
        positions = getattr(text_encoder.config, "max_position_embeddings", None)
        if positions and config.model_max_length > positions:
            raise UserError(f"--model_max_length {config.model_max_length}: the text encoder takes {positions} at most")
    tokenizer = _tokenizer(config, source)
    latent_scale = config.latent_scale or latent_scale_of(vae)
    print(f"Latent scale {latent_scale:g}: {_scale_reason(config, vae, latent_scale)}.")
    writer = StoreWriter(Path(config.output_dir), _info(config, source, vae, text_encoder, tokenizer, latent_scale))
    if writer.complete:
        print(f"{config.output_dir} is complete: {len(source):,} pairs.")
        return
    if config.text != "contexts":
        save_tokenizer(tokenizer, writer.folder / "tokenizer")

    device = pick_device(config.device)
    encoders = Encoders(
        vae=vae.to(device),
        text_encoder=text_encoder.to(device) if text_encoder else None,
        tokenizer=tokenizer,
        device=device,
        num_tokens=config.model_max_length,
        batch_size=config.batch_size,
        dtype=np.dtype(config.dtype),
        token_dtype=np.dtype(writer.info.token_dtype) if writer.info.token_dtype else None,
    )
    first = writer.next_shard
    done = writer.rows(first).start if first < writer.num_shards else len(source)
    if first:
        print(f"Going on after {done:,} of {len(source):,} pairs.")
    decoded = _decode(config, source, writer, first)
    try:
        with tqdm(total=len(source), initial=done, unit="pair", disable=config.disable_tqdm) as progress:

            def encoded(num_batches: int) -> Iterator[EncodedPairs]:
                for batch in islice(decoded, num_batches):
                    yield encoders.pairs(batch)
                    progress.update(len(batch.ids))

            for shard in range(first, writer.num_shards):
                writer.write_shard(shard, encoded(-(-len(writer.rows(shard)) // config.batch_size)))
    except KeyboardInterrupt:
        print(f"Stopped after {writer.next_shard} of {writer.num_shards} shards; run the same command to go on.")
        raise
    contexts, token_ids = encoders.captions([""])
    writer.finish(None if contexts is None else contexts[0], None if token_ids is None else token_ids[0])
    size = sum(path.stat().st_size for path in writer.folder.rglob("*") if path.is_file())
    print(f"{len(source):,} pairs, {size / 2**20:,.1f} MiB: {config.output_dir}")


# What the store says of itself


def _info(
    config: ExtractConfig,
    source: Source,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    latent_scale: float,
) -> StoreInfo:
    side = config.resolution // downsampling_of(vae)
    num_tokens = config.model_max_length
    context_shape = (num_tokens, text_encoder.config.hidden_size) if text_encoder else None
    token_dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    found_at = (
        config.tokenizer_name or config.text_encoder_name_or_path or f"built from the captions of {config.source}"
    )
    return StoreInfo(
        num_pairs=len(source),
        shard_size=config.shard_size,
        dtype=config.dtype,
        moments_shape=(2 * vae.config["latent_channels"], side, side),
        context_shape=context_shape,
        num_tokens=num_tokens,
        token_dtype=token_dtype if config.text != "contexts" else None,
        latent_scale=latent_scale,
        source={
            "source": _place(config.source),
            "split": config.split,
            "image_folder": _place(config.image_folder) if config.image_folder else None,
            "resolution": config.resolution,
        },
        vae={"name": _place(config.vae_name_or_path), "sha256": fingerprint(vae)},
        text_encoder={
            "name": _place(config.text_encoder_name_or_path or ""),
            "sha256": fingerprint(text_encoder),
        }
        if text_encoder
        else None,
        tokenizer={"name": _place(found_at), "sha256": _vocabulary_fingerprint(tokenizer)},
    )


def _place(name_or_path: str) -> str:
    """A local file or folder made absolute; hub ids and built-in names as they are."""
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.exists() else name_or_path


def _vocabulary_fingerprint(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _scale_reason(config: ExtractConfig, vae: Any, latent_scale: float) -> str:
    if config.latent_scale:
        return "as --latent_scale says"
    stored = vae.config["scaling_factor"]
    if latent_scale == stored:
        return "stored with the VAE"
    return f"U-ViT's own for a Stable Diffusion VAE, which says {stored:g}"


def _tokenizer(config: ExtractConfig, source: Source) -> Any:
    if config.tokenizer_name:
        return load_tokenizer(config.tokenizer_name)
    if config.text_encoder_name_or_path:
        return load_tokenizer(config.text_encoder_name_or_path)
    return train_tokenizer(captions_of(source), config.vocab_size or 8192, config.model_max_length)


# Decoding


@dataclass(frozen=True)
class Decoded:
    """B pairs, or the mistake that one of them holds."""

    ids: list[str]
    captions: list[tuple[str, ...]]
    # Not a tensor: those come by file descriptor, and a Ctrl-C amid that makes the worker complain.
    pixels: np.ndarray  # (B, 3, R, R) uint8
    error: UserError | None = None


class _Batches(Dataset[Decoded]):
    """Item i: the pairs of rows[i]. A mistake is handed over; raised in a worker, it brings a traceback."""

    def __init__(self, source: Source, rows: list[range], resolution: int):
        self.source, self.rows, self.resolution = source, rows, resolution

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Decoded:
        try:
            pairs = [self.source[row] for row in self.rows[index]]
        except UserError as error:
            return Decoded([], [], np.empty(0), error)
        pixels = np.stack([to_pixels(pair.image, self.resolution) for pair in pairs])
        return Decoded([pair.id for pair in pairs], [pair.captions for pair in pairs], pixels)


def _decode(config: ExtractConfig, source: Source, writer: StoreWriter, first_shard: int) -> Iterator[Decoded]:
    """The batches from that shard on, in order."""
    rows = [
        shard[start : start + config.batch_size]
        for shard in map(writer.rows, range(first_shard, writer.num_shards))
        for start in range(0, len(shard), config.batch_size)
    ]
    loader = DataLoader(
        _Batches(source, rows, config.resolution),
        batch_size=None,
        num_workers=min(config.num_workers, len(rows)),
        worker_init_fn=leave_stopping_to_the_main_process,
    )
    for batch in loader:
        if batch.error:
            raise batch.error
        yield batch
