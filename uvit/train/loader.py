"""Features -> batches. Item j of the dataset is batch j of the run, and depends on (seed, sample counter) only.

So resuming needs no saved random state. The samples of a step, their captions, timesteps and noise do not depend on the
number of threads, of processes or of accumulation steps.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_map_only

from uvit.config.objective import ObjectiveConfig
from uvit.diffusion import CONTEXT_DROP_PROBABILITY, NUM_TIMESTEPS
from uvit.store.reader import FeatureStore
from uvit.store.types import Features
from uvit.train.epochs import EpochRange, locate_samples
from uvit.train.memory_features import FeaturesInMemory, Picks, fields_of
from uvit.train.noise import Stream, draw_noise

NUM_ROUNDS = 8
ITEMS_AHEAD = 4  # per thread

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """All inputs of one forward pass of training. No random number is drawn after this.

    Captions that are dropped for guidance are already replaced by the empty one. One of `context` and `token_ids` is
    None, and so are `moments` and `posterior_noise`, or `images`.
    """

    moments: Tensor | None  # (B, 2 C, h, w), as stored
    context: Tensor | None  # (B, T, D), as stored
    token_ids: Tensor | None  # (B, T), int64
    posterior_noise: Tensor | None  # (B, C, h, w), float32
    noise: Tensor  # (B, C, h, w), float32
    timesteps: Tensor  # (B,), in (0, 1000]: int64, or float32 where they are fractional
    images: Tensor | None = None  # (B, 3, H, W), uint8, mirrored where they are; then C, h, w are 3, H, W
    teacher: Tensor | None = None  # (B, C', h', w'), float16, the features that are aligned with

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the tensors until what `stream` has now to do is done, even if they are deleted before."""
        for field in fields(self):
            if isinstance(tensor := getattr(self, field.name), Tensor):
                tensor.record_stream(stream)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..size-1 keyed by (seed, epoch), at `positions`, without storing a shuffled list.

    A Feistel network permutes 0..4^k-1, the next power of four; results of `size` or more are permuted again.
    (B,) -> (B,) int64.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.random.Philox(key=[seed, Stream.ORDER], counter=[0, 0, 0, epoch]).random_raw(NUM_ROUNDS)
    out = positions.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[outside] = left << shift | right
        outside = out >= size
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class RandomDraws:
    """The random numbers of B samples."""

    captions: np.ndarray  # (B,) in [0, 1): chooses one of the captions
    dropped: np.ndarray  # (B,) bool: the empty caption replaces the caption
    timesteps: np.ndarray  # (B,) int64, 1..1000
    posterior_noise: np.ndarray | None  # (B, C, h, w) float32; None: not drawn, as images have no posterior
    noise: np.ndarray | None  # (B, C, h, w) float32; None: not drawn, as `noise.py` draws it


def random_draws(
    counters: np.ndarray,
    seed: int,
    latent_shape: tuple[int, ...],
    noise_offset: float = 0.0,
    posterior: bool = True,
    noises: bool = True,
) -> RandomDraws:
    """The random numbers of the samples with these counters. Each sample has its own part of a Philox stream."""
    num_samples = len(counters)
    uniform = np.empty((num_samples, 3))
    noise = np.empty((num_samples, *latent_shape), dtype=np.float32) if noises else None
    posterior_noise = np.empty((num_samples, *latent_shape), dtype=np.float32) if noises and posterior else None
    for i, generator in enumerate(_generators(counters, seed, Stream.DRAWS)):
        generator.random(out=uniform[i])
        if posterior_noise is not None:
            generator.standard_normal(dtype=np.float32, out=posterior_noise[i])
        if noise is not None:
            generator.standard_normal(dtype=np.float32, out=noise[i])
            if noise_offset:
                noise[i] += noise_offset * generator.standard_normal((latent_shape[0], 1, 1), dtype=np.float32)
    return RandomDraws(
        captions=uniform[:, 0],
        dropped=uniform[:, 1] < CONTEXT_DROP_PROBABILITY,
        timesteps=(uniform[:, 2] * NUM_TIMESTEPS).astype(np.int64) + 1,
        posterior_noise=posterior_noise,
        noise=noise,
    )


def flip_draws(counters: np.ndarray, seed: int) -> np.ndarray:
    """(B,) in [0, 1): chooses the image or its mirror image. A separate stream keeps `random_draws` as it is."""
    return np.array([generator.random() for generator in _generators(counters, seed, Stream.FLIPS)])


def timestep_draws(counters: np.ndarray, seed: int, config: ObjectiveConfig) -> np.ndarray:
    """Fractional timesteps, (B,) float32 in (0, 1000], and at least 1 on a vp path. Also a separate stream."""
    uniform, normal = np.empty((len(counters), 2)), np.empty(len(counters))
    for i, generator in enumerate(_generators(counters, seed, Stream.LEVELS)):
        generator.random(out=uniform[i])
        normal[i] = generator.standard_normal()
    level = 1 - uniform[:, 0]  # the noise level n / 1000
    if config.timestep_sampling == "logit_normal":
        drawn = 1 / (1 + np.exp(-config.logit_mean - config.logit_std * normal))
        level = np.where(uniform[:, 1] < config.uniform_share, level, drawn)
    level = config.timestep_shift * level / (1 + (config.timestep_shift - 1) * level)
    return np.maximum(NUM_TIMESTEPS * level, 0 if config.path == "linear" else 1).astype(np.float32)


def _generators(counters: np.ndarray, seed: int, stream: int) -> Iterator[np.random.Generator]:
    """One generator, set to the start of each sample's part of a stream in turn."""
    bits = np.random.Philox(key=[seed, stream])
    generator = np.random.Generator(bits)
    state = bits.state
    for counter in counters:
        state["state"]["counter"][:] = (0, 0, 0, counter)
        bits.state = state
        yield generator


class BatchDataset:
    """Item j: samples j B .. (j+1) B - 1 of the run, counted from `first_sample`, which may be changed at any time.

    Args:
        use_tokens: return token ids, to be encoded in training, instead of stored text embeddings.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        seed: int,
        use_tokens: bool = False,
        config: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - it is frozen
    ):
        self.features, self.batch_size, self.seed = features, batch_size, seed
        self.use_tokens, self.config = use_tokens, config
        self.memory: FeaturesInMemory | None = None  # the features, if they are there
        self.first_sample = 0
        self.epochs = [EpochRange(0, 0, features.num_samples)]

    def rows(self, counters: np.ndarray) -> np.ndarray:
        """The row of the features for each sample. An epoch has each row once, in an order of its own."""
        epochs, positions, sizes = locate_samples(self.epochs, counters)
        rows = np.empty_like(counters)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(positions[here], int(sizes[here][0]), self.seed, int(epoch))
        return rows

    def __getitem__(self, index: int) -> Batch:
        return self.finish(self.prepare(index))

    def prepare(self, index: int) -> "PreparedBatch":
        """The part of a batch that is made on the host."""
        features, config = self.features, self.config
        counters = self.first_sample + np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        by_loader = config.noise_device == "host"
        draws = random_draws(
            counters, self.seed, features.latents_shape, config.noise_offset, not features.is_pixels, by_loader
        )
        timesteps = draws.timesteps if config.whole_timesteps() else timestep_draws(counters, self.seed, config)
        flips = flip_draws(counters, self.seed) if features.flipped else None
        rows = self.rows(counters)
        known = {"timesteps": timesteps, "noise": draws.noise, "posterior_noise": draws.posterior_noise}
        picks = None
        if self.memory is None:
            known |= self._read(rows, draws, flips)
        else:
            assert isinstance(features, FeatureStore)
            captions = features.caption_items(rows, draws.captions)
            picked = (rows, captions, draws.dropped, None if flips is None else flips < 0.5)
            picks = Picks(*map(to_tensor, picked))  # type: ignore[arg-type]
        tensors = {name: torch.from_numpy(array) for name, array in known.items() if array is not None}
        return PreparedBatch(tensors, picks, None if by_loader else torch.tensor(counters[0]))

    def _read(self, rows: np.ndarray, draws: RandomDraws, flips: np.ndarray | None) -> dict[str, np.ndarray | None]:
        """The features of the samples `rows`, from disk."""
        features = self.features
        read = features.read(rows, draws.captions, flips)
        teacher = None
        if self.config.needs_teacher():
            assert isinstance(features, FeatureStore)
            teacher = features.read_teacher(rows)
        context, token_ids = None, None
        if self.use_tokens:
            assert read.token_ids is not None and features.empty_token_ids is not None
            token_ids = read.token_ids.astype(np.int64)
            token_ids[draws.dropped] = features.empty_token_ids
        else:
            assert read.context is not None and features.empty_context is not None
            context = read.context
            context[draws.dropped] = features.empty_context
        return {
            "moments": read.moments,
            "images": read.images,
            "context": context,
            "token_ids": token_ids,
            "teacher": teacher,
        }

    def finish(self, prepared: "PreparedBatch") -> Batch:
        """The rest of it: features that are in memory, and noise that the host has not drawn, where `prepared` is."""
        features, tensors = self.features, dict(prepared.tensors)
        if prepared.picks is not None:
            assert self.memory is not None
            tensors |= fields_of(self.memory.gather(prepared.picks))
        if (first := prepared.first_sample) is not None:
            posterior_noise, tensors["noise"] = draw_noise(
                first if first.device.type != "cpu" else int(first),
                self.batch_size,
                self.seed,
                features.latents_shape,
                self.config.noise_offset,
                not features.is_pixels,
            )
            tensors |= {} if posterior_noise is None else {"posterior_noise": posterior_noise}
        return Batch(**(NO_FEATURES | tensors))  # type: ignore[arg-type]


NO_FEATURES = dict.fromkeys(("moments", "context", "token_ids", "posterior_noise"))


@dataclass(frozen=True)
class PreparedBatch:
    """What the host has made of a batch."""

    tensors: dict[str, Tensor]  # fields of the batch
    picks: Picks | None  # the features to gather from memory
    first_sample: Tensor | None  # 0-d int64: the noise to draw is that of the samples from this one on

    def to(self, device: torch.device) -> "PreparedBatch":
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), self)

    def pin_memory(self) -> "PreparedBatch":
        return tree_map_only(Tensor, Tensor.pin_memory, self)


for _each in (PreparedBatch, Picks):
    register_dataclass(_each)


def to_tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def prefetch(batches: BatchDataset, items: range, num_workers: int, device: torch.device) -> Iterator[Batch]:
    """These items, in order, on the device, prepared ahead by `num_workers` threads; 0: in this thread, on demand."""
    num_threads = min(num_workers, os.cpu_count() or 1)
    if device.type != "cuda":
        return (batch.to(device) for batch in prefetch_in_threads(batches.__getitem__, items, num_threads))

    def make(item: int) -> PreparedBatch:
        return batches.prepare(item).pin_memory()

    return copy_ahead(prefetch_in_threads(make, items, num_threads), batches.finish, device)


def copy_ahead(
    prepared: Iterator[PreparedBatch], finish: Callable[[PreparedBatch], Batch], device: torch.device
) -> Iterator[Batch]:
    """Copy each batch to the GPU, and finish it there, while the GPU computes with the batch before: on a side stream.

    A batch may be used on the stream that is current when it is asked for.
    """
    side = torch.cuda.Stream(device)
    ahead = deque[tuple[Batch, torch.cuda.Event]]()
    for each in itertools.chain(prepared, [None]):
        if each is not None:
            with torch.cuda.stream(side):
                ahead.append((finish(each.to(device)), side.record_event()))
        if len(ahead) > (each is not None):
            batch, copied = ahead.popleft()
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            batch.record_stream(current)  # its memory must not be used again before that
            yield batch


def prefetch_in_threads(make: Callable[[int], T], items: Sequence[int], num_threads: int) -> Iterator[T]:
    """make(item) of each item, in order.

    Threads, and not the processes of a DataLoader: reading and random numbers release the interpreter's lock, and
    passing 4 MB between processes takes as long as making them.
    """
    if not num_threads:
        yield from map(make, items)
        return
    ahead = deque[Future[T]]()
    pool = ThreadPoolExecutor(num_threads, "load")
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > ITEMS_AHEAD * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
