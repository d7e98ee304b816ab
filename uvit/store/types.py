"""The protocol of all readers of features, and the batch that they return."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from uvit.conventions import LatentSpace


@dataclass(frozen=True)
class FeatureBatch:
    """The features of B samples: `moments` or `images`, and at least one of `context` and `token_ids`."""

    moments: np.ndarray | None  # (B, 2 C, h, w), as stored (float16 or float32)
    context: np.ndarray | None  # (B, T, D), as stored
    token_ids: np.ndarray | None  # (B, T), integers
    images: np.ndarray | None = None  # (B, 3, H, W), uint8

    def latents(self) -> np.ndarray:
        """The means of the moments (B, C, h, w), as stored, or the images (B, 3, H, W) uint8."""
        return self.images if self.moments is None else np.split(self.moments, 2, axis=1)[0]  # type: ignore[return-value]


class Features(Protocol):
    """The moments or the images of a dataset, and its text embeddings or token ids. Picklable."""

    num_samples: int
    latents_shape: tuple[int, ...]  # (C, h, w) of the moments; or (3, H, W): images are stored, for a model on pixels
    is_pixels: bool  # images are stored
    flipped: bool  # mirrored images can be read: their moments are stored too, or images are stored
    context_shape: tuple[int, ...] | None  # (T, D); None: only token ids are stored
    num_tokens: int | None  # T
    latent_space: LatentSpace | None  # None: not known
    resolution: int | None  # side of the images in pixels; None: not known
    empty_context: np.ndarray | None  # (T, D), as stored
    empty_token_ids: np.ndarray | None  # (T,)
    vae_name: str | None  # names or paths of the encoders, as `uvit.weights` loads them
    vae_sha256: str | None  # fingerprint of the encoder; None: not known
    text_encoder_name: str | None
    text_encoder_sha256: str | None
    tokenizer_name: str | None
    tokenizer_sha256: str | None
    teacher_shape: tuple[int, ...] | None  # (C, h, w) of a teacher's features; None: there are none
    teacher_sha256: str | None

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        """Read the samples `rows`, (B,) int64. `caption_draws`, (B,) in [0, 1), picks the caption of each.

        `flip_draws`, (B,) in [0, 1), is for stores with `flipped`: below 0.5, the mirrored image is read.
        The caller may change the arrays.
        """
        ...

    def captions(self, row: int) -> tuple[str, ...]:
        """The captions of a sample as text. Empty if they were not stored."""
        ...
