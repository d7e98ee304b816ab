"""Encode decoded pairs with the VAE and the text encoder: several batches at a time, with results in order.

On a CPU, one thread computes each batch. The number of threads that share a matrix product changes its last bits, so
the stored features would otherwise depend on the number of cores.
"""

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.extract.teacher import Teacher
from uvit.extract.workers import Decoded
from uvit.images import to_unit
from uvit.sources.types import Problem
from uvit.store.shard import EncodedPairs
from uvit.weights.encoders import are_truncated, downsampling_of, encode_images, encode_tokens, tokenize

PIXELS_AT_ONCE = 2**16  # that a thread encodes on a CPU: more take memory and gain nothing


@dataclass(frozen=True)
class Encoders:
    """The VAE, the text encoder and the settings of the encoding. `encode` may run in several threads."""

    vae: Any  # None: the images are stored as they are
    text_encoder: Any  # None: text embeddings are not stored
    tokenizer: Any
    device: torch.device
    precision: torch.dtype  # of autocast; float32: no autocast
    num_tokens: int
    batch_size: int
    flip: bool  # also encode the mirrored images
    dtype: np.dtype  # of moments and text embeddings
    token_dtype: np.dtype | None  # None: token ids are not stored
    skip: bool  # skip a pair with NaN or infinite features; False: stop
    teacher: Teacher | None = None  # None: its features are not stored
    stopped: threading.Event = field(default_factory=threading.Event)  # set: stop as soon as possible

    def tokenize(self, captions: list[str]) -> Tensor:
        """c captions -> (c, T). Only one thread may call this at a time: fast tokenizers allow no more."""
        if not captions:
            return torch.empty((0, self.num_tokens), dtype=torch.int64)
        return tokenize(self.tokenizer, captions, self.num_tokens)

    def are_truncated(self, captions: list[str]) -> np.ndarray:
        """c captions -> (c,) bool. Only one thread may call this at a time."""
        return are_truncated(self.tokenizer, captions, self.num_tokens)

    def encode(self, batch: Decoded, token_ids: Tensor, truncated: np.ndarray) -> EncodedPairs:
        """`token_ids` (c, T) and `truncated` (c,) are of all captions of the batch.

        Raises UserError if the features of all pairs (without `skip`, of any pair) are NaN or infinite."""
        try:
            with self._computing():
                flipped = self._images(batch.pixels[..., ::-1].copy()) if self.flip and self.vae else None
                moments = self._images(batch.pixels) if self.vae else None
                contexts = self._contexts(token_ids)
                teacher = self._teacher_features(batch.pixels)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_size {self.batch_size}: needs more memory than {self.device} has; run the same command with a"
                " smaller one to resume"
            ) from None
        counts = np.array([len(captions) for captions in batch.captions], dtype=np.int64)
        owners = np.repeat(np.arange(len(batch.ids)), counts)  # (c,)
        good = np.ones(len(batch.ids), dtype=bool)
        problems = []
        for what, features, rows in (
            ("moments", moments, np.arange(len(batch.ids))),
            ("moments", flipped, np.arange(len(batch.ids))),
            ("text embeddings", contexts, owners),
            ("teacher's features", teacher, np.arange(len(batch.ids))),
        ):
            if features is None:
                continue
            finite = torch.isfinite(self._stored(features).flatten(1)).all(dim=1).numpy()
            bad = np.unique(rows[~finite])
            if len(bad) and (not self.skip or len(bad) == len(batch.ids) > 1):
                raise UserError(self._not_finite(f"some {what}", features))
            for i in bad[good[bad]]:
                message = self._not_finite(f"the {what} of {batch.ids[i]}", features[torch.from_numpy(rows == i)])
                problems.append(Problem(batch.ids[i], "not finite", message))
            good[bad] = False
        kept, kept_captions = np.flatnonzero(good), np.flatnonzero(good[owners])
        return EncodedPairs(
            ids=[batch.ids[i] for i in kept],
            captions=[batch.captions[i] for i in kept],
            moments=None if moments is None else self._stored(moments).numpy()[kept],
            images=batch.pixels[kept] if self.vae is None else None,
            flipped=None if flipped is None else self._stored(flipped).numpy()[kept],
            contexts=None if contexts is None else self._stored(contexts).numpy()[kept_captions],
            token_ids=self._token_ids(token_ids[torch.from_numpy(kept_captions)]),
            problems=(*batch.problems, *problems),
            num_truncated=int(truncated[kept_captions].sum()),
            teacher=None if teacher is None else teacher.numpy()[kept],
        )

    def empty(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The empty caption's text embedding (T, D) and token ids (T,). None: not stored.

        Raises UserError if the embedding is NaN or infinite.
        """
        token_ids = self.tokenize([""])
        with self._computing():
            contexts = self._contexts(token_ids)
        ids = self._token_ids(token_ids)
        if contexts is not None and not torch.isfinite(self._stored(contexts)).all():
            raise UserError(self._not_finite("the text embeddings of the empty caption", contexts))
        return None if contexts is None else self._stored(contexts).numpy()[0], None if ids is None else ids[0]

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Inference mode and autocast, which PyTorch sets for each thread."""
        low = self.precision != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision if low else None, enabled=low):
            yield

    def _images(self, pixels: np.ndarray) -> Tensor:
        """(B, 3, R, R) uint8 -> moments (B, 2 C, h, w), on the CPU."""
        at_once = self.batch_size
        if self.device.type == "cpu":
            at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[2] * pixels.shape[3]))
        parts = [encode_images(self.vae, to_unit(self._to_device(part))) for part in self._split(pixels, at_once)]
        return torch.cat(parts).cpu() if parts else torch.empty((0, *self._moments_shape(pixels)))

    def _contexts(self, token_ids: Tensor) -> Tensor | None:
        """(c, T) -> (c, T, D), on the CPU."""
        if self.text_encoder is None:
            return None
        parts = [
            encode_tokens(self.text_encoder, self._to_device(part), self.tokenizer.pad_token_id)
            for part in self._split(token_ids.numpy(), self.batch_size)
        ]
        width = self.text_encoder.config.hidden_size
        return torch.cat(parts).cpu() if parts else torch.empty((0, self.num_tokens, width))

    def _teacher_features(self, pixels: np.ndarray) -> Tensor | None:
        """(B, 3, R, R) uint8 -> (B, C, h, w) float16, on the CPU."""
        if self.teacher is None:
            return None
        parts = [self.teacher.encode(part.numpy()) for part in self._split(pixels, self.batch_size)]
        features = torch.cat(parts) if parts else torch.empty((0, *self.teacher.features_shape))
        return features.to(torch.float16)

    def _split(self, items: np.ndarray, size: int) -> Iterator[Tensor]:
        for start in range(0, len(items), size):
            if self.stopped.is_set():
                raise CancelledError
            yield torch.from_numpy(items[start : start + size])

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _moments_shape(self, pixels: np.ndarray) -> tuple[int, ...]:
        factor = downsampling_of(self.vae)
        return 2 * self.vae.config["latent_channels"], pixels.shape[2] // factor, pixels.shape[3] // factor

    def _stored(self, features: Tensor) -> Tensor:
        return features.to(getattr(torch, self.dtype.name))

    def _token_ids(self, token_ids: Tensor) -> np.ndarray | None:
        return None if self.token_dtype is None else token_ids.numpy().astype(self.token_dtype)

    def _not_finite(self, what: str, features: Tensor) -> str:
        reason = "give --dtype float32" if torch.isfinite(features).all() else "the encoder itself returns such values"
        return f"--dtype {self.dtype.name}: {what} are NaN or infinite; {reason}"


@contextlib.contextmanager
def encoding_threads(encoders: Encoders) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """(pool, number of batches at a time). On a CPU, each thread then computes with one core, this thread too."""
    on_cpu, before = encoders.device.type == "cpu", torch.get_num_threads()
    at_once = before if on_cpu else 2  # on a GPU, one batch is computed while the results of another are copied
    if on_cpu:
        torch.set_num_threads(1)
    single_thread = functools.partial(torch.set_num_threads, 1)
    pool = ThreadPoolExecutor(at_once, "encode", initializer=single_thread if on_cpu else None)
    try:
        yield pool, at_once
    finally:
        encoders.stopped.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def encode_in_order(
    encoders: Encoders, decoded: Iterator[Decoded], pool: ThreadPoolExecutor, at_once: int
) -> Iterator[tuple[Decoded, EncodedPairs]]:
    """Encode batches in the pool. At most `at_once` + 1 of them are in progress."""
    waiting = deque[tuple[Decoded, Future[EncodedPairs]]]()
    for batch in decoded:
        captions = [caption for each in batch.captions for caption in each]
        features = pool.submit(encoders.encode, batch, encoders.tokenize(captions), encoders.are_truncated(captions))
        waiting.append((batch, features))
        if len(waiting) > at_once:
            first, encoded = waiting.popleft()
            yield first, encoded.result()
    for batch, encoded in waiting:
        yield batch, encoded.result()
