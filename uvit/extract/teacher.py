"""The teacher of `--align repa` and `irepa`: a vision model that turns images into grids of features."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uvit.errors import UserError
from uvit.weights.encoders import fingerprint
from uvit.weights.vision import load_vision_model


@dataclass(frozen=True)
class Teacher:
    """Images -> features (C, h, w). A whole image is stretched to the side that the model's image processor names."""

    model: Any
    processor: Any
    side: int
    features_shape: tuple[int, int, int]
    record: dict[str, str]  # {"name", "sha256"}

    def to(self, device: torch.device) -> "Teacher":
        return replace(self, model=self.model.to(device))

    def encode(self, pixels: np.ndarray) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, C, h, w) on the CPU."""
        device = next(self.model.parameters()).device
        return feature_map(self.model, prepare(self.processor, pixels, self.side).to(device), self.side).float().cpu()


def load_teacher(name: str, recorded_name: str) -> Teacher:
    """Raises UserError where the model cannot be loaded, or gives no grid of features."""
    try:
        model, _, processor = load_vision_model(name)
    except UserError as error:
        raise UserError(f"--teacher {error}") from None
    model = getattr(model, "vision_model", model)  # of a CLIP or SigLIP
    try:
        side = input_side(processor)
        with torch.inference_mode():
            found = feature_map(model, prepare(processor, np.zeros((1, 3, 8, 8), np.uint8), side), side)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--teacher {name}: gives no grid of features ({reason}); give a vision model, such as a DINOv2, a ViT or "
            "a ConvNeXt"
        ) from None
    _, channels, height, width = found.shape
    record = {"name": recorded_name, "sha256": fingerprint(model)}
    return Teacher(model, processor, side, (channels, height, width), record)


def input_side(processor: Any) -> int:
    """The side of the square images that an image processor makes."""
    crops = getattr(processor, "do_center_crop", False) and processor.crop_size
    size = crops or processor.size
    return int(size["height"] if size.get("height") else size["shortest_edge"])


def prepare(processor: Any, pixels: np.ndarray, side: int) -> Tensor:
    """(B, 3, R, R) uint8 -> (B, 3, side, side). Nothing is cropped: the features cover what the latents cover."""
    images = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in channels_last(pixels)]
    return processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"].float()


def channels_last(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def feature_map(model: Any, pixels: Tensor, side: int) -> Tensor:
    """(B, 3, side, side) -> (B, C, h, w): a map as it is, or the tokens of the patches without those before them."""
    last = model(pixel_values=pixels).last_hidden_state
    if last.ndim == 4:
        return last
    patch = getattr(model.config, "patch_size", None)
    length = side // patch if isinstance(patch, int) else 0
    if not 0 < length**2 <= last.shape[1]:  # not the tokens of patches of that size, but of merged ones
        length = math.isqrt(last.shape[1])
        if length**2 != last.shape[1]:
            raise ValueError(f"{last.shape[1]} tokens are no square")
    return last[:, -(length**2) :].transpose(1, 2).unflatten(2, (length, length))
