"""Encode decoded pairs with the VAE and the text encoder: batches in parts, in several threads, with results in order.

On a CPU, one thread with one core computes each part. The number of threads that share a matrix product changes its
last bits, so the stored features would otherwise depend on the number of cores.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from uvit.weights.encoders import are_truncated, encode_images, encode_tokens, tokenize

PIXELS_AT_ONCE = 2**16  # that a thread encodes on a CPU: more take memory and gain nothing


@dataclass(frozen=True)
class BatchInProgress:
    """A batch whose parts are being encoded."""

    batch: Decoded
    token_ids: Tensor  # (c, T), of its c captions
    truncated: np.ndarray  # (c,) bool
    moments: list[Future[Tensor]] | None  # of each part. None: not stored, as below
    flipped: list[Future[Tensor]] | None
    contexts: list[Future[Tensor]] | None
    teacher: list[Future[Tensor]] | None


@dataclass(frozen=True)
class Encoders:
    """The VAE, the text encoder and the settings of the encoding."""

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

    def start(self, batch: Decoded, pool: ThreadPoolExecutor) -> BatchInProgress:
        """Tokenize the captions, and have the threads of the pool encode the batch in parts."""
        captions = [caption for each in batch.captions for caption in each]
        token_ids = torch.empty((0, self.num_tokens), dtype=torch.int64)
        if captions:
            token_ids = tokenize(self.tokenizer, captions, self.num_tokens)

        def in_parts(encode: Callable[[Tensor], Tensor], items: Tensor, size: int) -> list[Future[Tensor]]:
            return [pool.submit(self._compute, encode, part) for part in items.split(size)]

        pixels, images_at_once = torch.from_numpy(batch.pixels), self.batch_size
        if self.device.type == "cpu":
            images_at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[2] * pixels.shape[3]))
        return BatchInProgress(
            batch=batch,
            token_ids=token_ids,
            truncated=are_truncated(self.tokenizer, captions, self.num_tokens),
            # The largest parts come first, so that all threads are busy until the last batch is nearly done.
            contexts=in_parts(self._contexts, token_ids, self.batch_size) if self.text_encoder else None,
            teacher=in_parts(self._teacher_features, pixels, self.batch_size) if self.teacher else None,
            moments=in_parts(self._moments, pixels, images_at_once) if self.vae else None,
            flipped=in_parts(self._flipped_moments, pixels, images_at_once) if self.vae and self.flip else None,
        )

    def finish(self, started: BatchInProgress) -> EncodedPairs:
        """Wait for the parts of a batch and join them.

        Raises UserError if the features of all pairs (without `skip`, of any pair) are NaN or infinite."""
        batch, token_ids, truncated = started.batch, started.token_ids, started.truncated
        contexts, teacher = joined(started.contexts), joined(started.teacher)
        moments, flipped = joined(started.moments), joined(started.flipped)
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
        token_ids = tokenize(self.tokenizer, [""], self.num_tokens)
        contexts = self._compute(self._contexts, token_ids) if self.text_encoder else None
        ids = self._token_ids(token_ids)
        if contexts is not None and not torch.isfinite(self._stored(contexts)).all():
            raise UserError(self._not_finite("the text embeddings of the empty caption", contexts))
        return None if contexts is None else self._stored(contexts).numpy()[0], None if ids is None else ids[0]

    def _compute(self, encode: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        """Encode a part (n, ...), with inference mode and autocast, which PyTorch sets for each thread."""
        if not len(part):  # no pair of a batch is usable: no features, but of the same shape as any others
            return self._compute(encode, part.new_zeros((1, *part.shape[1:])))[:0]
        low = self.precision != torch.float32
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, self.precision if low else None, enabled=low):
                return encode(part)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_size {self.batch_size}: needs more memory than {self.device} has; run the same command with a"
                " smaller one to resume"
            ) from None

    def _moments(self, pixels: Tensor) -> Tensor:
        """(n, 3, R, R) uint8 -> (n, 2 C, h, w), on the CPU."""
        return encode_images(self.vae, to_unit(self._to_device(pixels))).cpu()

    def _flipped_moments(self, pixels: Tensor) -> Tensor:
        """(n, 3, R, R) uint8 -> the moments of the mirrored images (n, 2 C, h, w), on the CPU."""
        return self._moments(pixels.flip(3))

    def _contexts(self, token_ids: Tensor) -> Tensor:
        """(n, T) -> (n, T, D), on the CPU."""
        return encode_tokens(self.text_encoder, self._to_device(token_ids), self.tokenizer.pad_token_id).cpu()

    def _teacher_features(self, pixels: Tensor) -> Tensor:
        """(n, 3, R, R) uint8 -> (n, C, h, w) float16, on the CPU."""
        assert self.teacher is not None
        return self.teacher.encode(pixels.numpy()).to(torch.float16)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _stored(self, features: Tensor) -> Tensor:
        return features.to(getattr(torch, self.dtype.name))

    def _token_ids(self, token_ids: Tensor) -> np.ndarray | None:
        return None if self.token_dtype is None else token_ids.numpy().astype(self.token_dtype)

    def _not_finite(self, what: str, features: Tensor) -> str:
        reason = "give --dtype float32" if torch.isfinite(features).all() else "the encoder itself returns such values"
        return f"--dtype {self.dtype.name}: {what} are NaN or infinite; {reason}"


def joined(parts: list[Future[Tensor]] | None) -> Tensor | None:
    return None if parts is None else torch.cat([part.result() for part in parts])


@contextlib.contextmanager
def encoding_threads(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """(pool, its number of threads). On a CPU, each thread then computes with one core, this thread too."""
    on_cpu, before = device.type == "cpu", torch.get_num_threads()
    num_threads = before if on_cpu else 2  # on a GPU, one part is computed while the results of another are copied
    if on_cpu:
        torch.set_num_threads(1)
    single_thread = functools.partial(torch.set_num_threads, 1)
    pool = ThreadPoolExecutor(num_threads, "encode", initializer=single_thread if on_cpu else None)
    try:
        yield pool, num_threads
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def encode_in_order(
    encoders: Encoders, decoded: Iterator[Decoded], pool: ThreadPoolExecutor, num_threads: int
) -> Iterator[tuple[Decoded, EncodedPairs]]:
    """Encode batches in the pool. `num_threads` + 1 are in progress: even batches of one part keep all threads busy."""
    in_progress = deque[BatchInProgress]()
    for batch in decoded:
        in_progress.append(encoders.start(batch, pool))
        if len(in_progress) > num_threads:
            yield in_progress[0].batch, encoders.finish(in_progress.popleft())
    while in_progress:
        yield in_progress[0].batch, encoders.finish(in_progress.popleft())
