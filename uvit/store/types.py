"""What the readers of features have in common."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class FeatureBatch:
    """What a feature store holds of B samples; `context` or `token_ids` is there, or both."""

    moments: np.ndarray  # (B, 2 C, h, w), as stored (float16 or float32)
    context: np.ndarray | None  # (B, T, D), as stored
    token_ids: np.ndarray | None  # (B, T), integers


class Features(Protocol):
    """Moments, and contexts or token ids, of a data set. Picklable."""

    num_samples: int
    moments_shape: tuple[int, ...]  # (2 C, h, w)
    flipped: bool  # the mirrored images' moments are there too
    context_shape: tuple[int, ...] | None  # (T, D); None where only token ids are stored
    num_tokens: int | None  # T
    latent_scale: float | None  # None: not known
    resolution: int | None  # side of the images, in pixels; None: not known
    empty_context: np.ndarray | None  # (T, D), as stored
    empty_token_ids: np.ndarray | None  # (T,)
    vae_name: str | None  # where the encoders were found, for `uvit.weights` to load
    vae_sha256: str | None  # their fingerprints; None: not known
    text_encoder_name: str | None
    text_encoder_sha256: str | None
    tokenizer_name: str | None

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        """Samples `rows`, (B,) int64, each with the caption that its draw, (B,) in [0, 1), picks.

        Where `flip_draws`, (B,) in [0, 1), are below a half, with the mirrored image's moments: only where `flipped`.
        The arrays are the caller's to change.
        """
        ...

    def captions(self, row: int) -> tuple[str, ...]:
        """The captions of a sample as text; none where they were not stored."""
        ...
