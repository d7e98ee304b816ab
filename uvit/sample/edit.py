"""Image-to-image and inpainting: sampling that begins with an image.

Shapes: B images, (H, W) pixels, C latent channels, (h, w) latent size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from uvit.conventions import DiffusionPath, LatentSpace
from uvit.errors import UserError
from uvit.images import to_rgb
from uvit.sample.denoise import at_step
from uvit.weights.encoders import encode_images

STRENGTH = 0.8  # the default without a mask, as in diffusers
HALF_LEVEL = 0.5 / 255  # that pixels may exceed [0, 1] by rounding


@dataclass(frozen=True)
class Original:
    """The images that sampling begins with."""

    pixels: Tensor  # (B, 3, H, W) in [-1, 1]
    latents: Tensor  # (B, C, h, w) float32, x_0 as in training: the posterior mean, without noise, or the pixels
    mask: Tensor | None  # (B, 1, H, W): 1 is repainted, 0 is kept

    def keep(self, scheduler: Any, step: int, latents: Tensor, noise: Tensor, path: DiffusionPath = "vp") -> Tensor:
        """Replace the kept part of `latents` by the image's latents at the noise level before `step`."""
        if self.mask is None:
            return latents
        # A latent with any repainted pixel is free. Its kept pixels are pasted in the end.
        free = adaptive_max_pool2d(self.mask, latents.shape[-2:])
        return torch.where(free > 0, latents, at_step(scheduler, step, self.latents, noise, path).to(latents))

    def paste(self, images: Tensor) -> Tensor:
        """Replace the kept part of `images` (B, 3, H, W) in [-1, 1] by the original pixels."""
        return images if self.mask is None else torch.where(self.mask > 0, images, self.pixels.to(images))


def read_original(
    vae: Any, space: LatentSpace, image: Any, mask_image: Any, size: tuple[int, int], batch: int, device: Any
) -> Original:
    """Read images as diffusers does: PIL, arrays (B, H, W, 3) or tensors (B, 3, H, W) in [0, 1], or lists of them.

    Args:
        mask_image: the same with one channel; white is repainted. None repaints everything.
        size: (H, W); images of another size are scaled.
        vae: None for a model on pixels.
        batch: B. n images are repeated B / n times each, in order.

    Raises ValueError if B is not a multiple of the number of images or masks, or if one of them is no image.
    """
    pixels = 2 * _processed("image", image, size, VaeImageProcessor(do_normalize=False)) - 1
    if space.is_pixels:
        latents = pixels.to(device)
    else:
        moments = encode_images(vae, pixels.to(device, vae.dtype))
        latents = space.normalize(moments.chunk(2, dim=1)[0].float())
    mask = None
    if mask_image is not None:
        processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        mask = _for_each(_processed("mask_image", mask_image, size, processor), batch, "masks").to(device)
    return Original(_for_each(pixels, batch, "images").to(device), _for_each(latents, batch, "images"), mask)


def first_step(strength: float, num_inference_steps: int, order: int) -> int:
    """The index of the scheduler's step to begin with, so that the last `strength` of all steps are run.

    Raises UserError if that is no step.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength} must be above 0 and at most 1")
    steps = int(num_inference_steps * strength + 1e-9)  # 0.29 of 100 is 28.999999999999996
    if steps == 0:
        raise UserError(f"strength {strength} of {num_inference_steps} steps is less than one step; raise one of them")
    return (num_inference_steps - steps) * order


def _processed(name: str, image: Any, size: tuple[int, int], processor: VaeImageProcessor) -> Tensor:
    """(n, channels, H, W) float32 in [0, 1], on the CPU: 3 channels, or 1 of a mask. `name` is for messages."""
    images = [_checked(name, item) for item in (image if isinstance(image, list) else [image])]
    if not images:
        raise ValueError(f"{name} is an empty list; leave it out, or give an image")
    pixels = processor.preprocess(images, height=size[0], width=size[1]).float().cpu()
    channels = 1 if processor.config["do_convert_grayscale"] else 3
    if pixels.shape[1] < channels or pixels.shape[2:] != size or (channels == 3 < pixels.shape[1]):
        found = " and ".join(sorted({str(tuple(item.shape)) for item in images}))
        raise ValueError(
            f"{name} has shape {found}; an array is (B, H, W, {channels}) and a tensor (B, {channels}, H, W)"
        )
    return pixels[:, :channels]


def _checked(name: str, image: Any) -> Any:
    """An image as its processor reads it. Raises ValueError, which begins with `name`, if it is none."""
    if isinstance(image, Image.Image) and min(image.size) > 0:
        return to_rgb(image)
    if not isinstance(image, np.ndarray | Tensor):
        what = f"{name} {type(image).__name__}"
        raise ValueError(f"{what} must be a PIL image with pixels, an array, a tensor, or a list of them")
    if isinstance(image, np.ndarray) and image.dtype.kind in "biu":  # as masks may be
        image = image.astype(np.float32)
    values = torch.from_numpy(image) if isinstance(image, np.ndarray) and image.dtype.kind == "f" else image
    if not isinstance(values, Tensor) or values.is_complex() or values.ndim not in (2, 3, 4) or not values.numel():
        raise ValueError(f"{name} of {image.dtype} and shape {tuple(image.shape)} is no image")
    if not (values.min() >= -HALF_LEVEL and values.max() <= 1 + HALF_LEVEL):  # NaN too
        raise ValueError(
            f"{name} must be in [0, 1], and goes from {values.min():g} to {values.max():g}; divide levels of 0..255 by "
            "255, or give a PIL image"
        )
    return image.float() if isinstance(image, Tensor) else image


def _for_each(values: Tensor, batch: int, what: str) -> Tensor:
    if batch % len(values):
        raise ValueError(f"there are {len(values)} {what} for {batch} images to generate")
    return values.repeat_interleave(batch // len(values), dim=0)
