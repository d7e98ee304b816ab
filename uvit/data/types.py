"""What crosses the arrows of the data flow."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """An image, RGB, of any size, and its captions, one or more."""

    id: str
    image: Image.Image
    captions: tuple[str, ...]


@dataclass(frozen=True)
class FeatureBatch:
    """What a feature store holds of B samples; `context` or `token_ids` is there, or both."""

    moments: np.ndarray  # (B, 2 C, h, w), as stored (float16 or float32)
    context: np.ndarray | None  # (B, T, D), as stored
    token_ids: np.ndarray | None  # (B, T), integers


@dataclass(frozen=True)
class Batch:
    """All that one forward pass of training consumes; nothing is drawn after this.

    With captions dropped for guidance already replaced by the empty one. `context` or `token_ids` is there.
    """

    moments: Tensor  # (B, 2 C, h, w), as stored
    context: Tensor | None  # (B, T, D), as stored
    token_ids: Tensor | None  # (B, T), int64
    posterior_noise: Tensor  # (B, C, h, w), float32
    noise: Tensor  # (B, C, h, w), float32
    timesteps: Tensor  # (B,), int64, labels 1..1000

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})
