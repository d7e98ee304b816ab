"""`--features_in_memory`: all features of a store in the memory of the host or of the device, gathered by index.

The samples, their captions and their order are those of the loader. It passes on which features a batch has, and no
longer the features: of 118 KiB a sample at COCO's shapes, 32 bytes are left to copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from uvit.store.arrays import ShardedArray
from uvit.store.reader import FeatureStore


@dataclass(frozen=True)
class Picks:
    """Which features the samples of a batch have."""

    rows: Tensor  # (B,) int64
    captions: Tensor  # (B,) int64, among all captions of the store
    dropped: Tensor  # (B,) bool: the empty caption replaces the caption
    flipped: Tensor | None  # (B,) bool: the mirror image replaces the image


@dataclass(frozen=True)
class Gathered:
    """The features of a batch, as in `loader.Batch`."""

    moments: Tensor | None
    images: Tensor | None
    context: Tensor | None
    token_ids: Tensor | None
    teacher: Tensor | None


class FeaturesInMemory:
    """The features that training reads, in the memory of a device. Loading them reads each file once."""

    def __init__(self, store: FeatureStore, use_tokens: bool, use_teacher: bool, device: torch.device):
        self.is_pixels, self.num_samples = store.is_pixels, store.num_samples
        arrays = needed_arrays(store, use_tokens, use_teacher)
        latents = [arrays[kind] for kind in ("latents", "flipped") if kind in arrays]
        self.latents = load(store, latents, device)  # the mirrored ones follow the others
        self.use_tokens = use_tokens
        empty = store.empty_token_ids if use_tokens else store.empty_context
        assert empty is not None
        self.texts = load(store, [arrays["tokens" if use_tokens else "contexts"]], device)
        self.empty_text = torch.from_numpy(as_known(empty)).to(device)
        self.teacher = load(store, [arrays["teacher"]], device) if use_teacher else None

    def gather(self, picks: Picks) -> Gathered:
        """The features of a batch. `picks`: on the same device."""
        rows = picks.rows
        if picks.flipped is not None and not self.is_pixels:
            rows = rows + self.num_samples * picks.flipped
        latents = self.latents[rows]
        if picks.flipped is not None and self.is_pixels:
            latents = torch.where(picks.flipped[:, None, None, None], latents.flip(-1), latents)
        texts = self.texts[picks.captions]
        dropped = picks.dropped.view(-1, *[1] * (texts.ndim - 1))
        texts = torch.where(dropped, self.empty_text, texts)
        return Gathered(
            moments=None if self.is_pixels else latents,
            images=latents if self.is_pixels else None,
            context=None if self.use_tokens else texts,
            token_ids=texts.long() if self.use_tokens else None,
            teacher=None if self.teacher is None else self.teacher[picks.rows],
        )


def needed_arrays(store: FeatureStore, use_tokens: bool, use_teacher: bool) -> dict[str, ShardedArray]:
    """The arrays of a store that training reads."""
    unused = {"contexts" if use_tokens else "tokens", *([] if use_teacher else ["teacher"])}
    return {kind: array for kind, array in store.arrays().items() if kind not in unused}


def load(store: FeatureStore, arrays: Sequence[ShardedArray], device: torch.device) -> Tensor:
    """All items of arrays of one shape, one array after the other, a file at a time."""
    num_items = sum(sum(array.lengths) for array in arrays)
    dtype = torch.from_numpy(as_known(arrays[0].empty(0))).dtype
    out = torch.empty((num_items, *arrays[0].shape), dtype=dtype, device=device)
    start = 0
    for array in arrays:
        for part in store.read_files(array):
            out[start : start + len(part)].copy_(torch.from_numpy(as_known(part)))
            start += len(part)
    return out


def as_known(array: np.ndarray) -> np.ndarray:
    """Token ids in a type that all operations of torch know."""
    return array.astype(np.int32) if array.dtype == np.uint16 else array


def fields_of(gathered: Gathered) -> dict[str, Tensor]:
    """Those that are there."""
    return {field.name: value for field in fields(gathered) if (value := getattr(gathered, field.name)) is not None}
