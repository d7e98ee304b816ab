"""One image as a generator: it yields what to ask the network, and is sent the predictions.

So several images, each at a step of its own, can share a call of the network (`uvit.sample.batching`). With a network
that answers each alone, the image is the one that the pipeline makes, to the bit.
"""

import copy
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uvit.conventions import TIMESTEP_OFFSETS
from uvit.diffusion import convert_prediction
from uvit.sample.arguments import check_images
from uvit.sample.denoise import ALL_TIMESTEPS, NetworkInput, denoising
from uvit.sample.edit import STRENGTH, first_step
from uvit.sample.pipeline import UViTPipeline


@dataclass(frozen=True)
class ImageSettings:
    """The arguments of `UViTPipeline.__call__` for one image."""

    seed: int
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float] = ALL_TIMESTEPS
    height: int | None = None
    width: int | None = None
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    strength: float | None = None


@torch.no_grad()
def image_steps(
    pipeline: UViTPipeline, scheduler: Any, context: Tensor, negative: Tensor, settings: ImageSettings
) -> Generator[NetworkInput, Tensor, Image.Image]:
    """Generate one image.

    Args:
        scheduler: of this image alone; the pipeline's own is not used.
        context, negative: the text embeddings (1, T, D) of the prompt and of the negative prompt.

    Raises ValueError as the pipeline does.
    """
    own = copy.copy(pipeline)  # the same networks
    own.scheduler = scheduler
    conventions = own.conventions
    shape = own._latents_shape(1, settings.height, settings.width)
    generator = [torch.Generator("cpu").manual_seed(settings.seed)]
    noise = own._noise(shape, generator, None)
    original = own._original(settings.image, settings.mask_image, shape)
    start = 0
    if original is not None:
        strength = settings.strength or (STRENGTH if settings.mask_image is None else 1.0)
        start = first_step(strength, settings.num_inference_steps, scheduler.order)

    def keep(i: int, _: Tensor, latents: Tensor) -> Tensor:
        return latents if original is None else original.keep(scheduler, i + 1, latents, noise, conventions.path)

    latents = yield from denoising(
        scheduler,
        noise,
        context,
        negative,
        settings.guidance_scale,
        settings.num_inference_steps,
        conventions.prediction_type,
        generator=generator,
        on_step=keep,
        timestep_offset=TIMESTEP_OFFSETS[conventions.timestep_labels],
        start=start,
        image=None if original is None else original.latents,
        guidance_interval=settings.guidance_interval,
        path=conventions.path,
    )
    check_images(latents, None)
    return own._decode(latents, original, "pil", None)[0]


@torch.no_grad()
def preview(pipeline: UViTPipeline, inputs: NetworkInput, prediction: Tensor, guidance_scale: float) -> Image.Image:
    """The image that the network predicts at one step of one image: blurred at first, and sharper from step to step."""
    conventions = pipeline.conventions
    x_n = inputs.latents[-1:].float()
    predicted = prediction[-1:].float()
    if len(prediction) > 1:
        predicted = prediction[:1].float() + guidance_scale * (predicted - prediction[:1].float())
    timesteps = inputs.timesteps[-1:] - (TIMESTEP_OFFSETS[conventions.timestep_labels] - 1)
    x_0 = convert_prediction(predicted, x_n, timesteps, conventions.prediction_type, "sample", conventions.path)
    return pipeline._decode(x_0.nan_to_num(0, 0, 0), None, "pil", None)[0]
