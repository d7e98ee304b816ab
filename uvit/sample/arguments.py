"""The arguments of `UViTPipeline.__call__`: what they must be, before any work is done.

Every problem is a ValueError that names the argument, its value and what to do.
"""

import difflib
import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from uvit.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Arguments of StableDiffusionPipeline that have no meaning here: (what is accepted all the same, why not).
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "timesteps": ((None,), "the scheduler spaces the steps; set num_inference_steps, or another pipeline.scheduler"),
    "sigmas": ((None,), "the scheduler spaces the steps; set num_inference_steps, or another pipeline.scheduler"),
    "guidance_rescale": ((None, 0), "is not supported; against overexposure use a lower guidance_scale, or "
                         "guidance_interval=(100, 1000)"),
    "clip_skip": ((None,), "the U-ViT is trained on the last hidden state of the text encoder; pass prompt_embeds"),
    "cross_attention_kwargs": ((None, {}), "a U-ViT has no cross-attention: text and image are one sequence"),
    "ip_adapter_image": ((None,), "there are no IP-Adapters for a U-ViT; `image` begins with an image"),
    "ip_adapter_image_embeds": ((None,), "there are no IP-Adapters for a U-ViT; `image` begins with an image"),
    "callback": ((None,), "was replaced in diffusers; use callback_on_step_end"),
    "callback_steps": ((None,), "was replaced in diffusers; use callback_on_step_end, which is called at every step"),
}  # fmt: skip


def check_settings(
    num_inference_steps: Any,
    num_images_per_prompt: Any,
    guidance_scale: Any,
    guidance_interval: Any,
    eta: Any,
    output_type: Any,
) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is none of {', '.join(map(repr, OUTPUT_TYPES))}")
    check_whole("num_inference_steps", num_inference_steps)
    check_whole("num_images_per_prompt", num_images_per_prompt)
    check_number("guidance_scale", guidance_scale)
    check_number("eta", eta)
    if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
        raise ValueError(f"guidance_interval {guidance_interval!r} must be two timesteps, the lower one first")
    for timestep in guidance_interval:
        check_number("guidance_interval", timestep)
    if guidance_interval[0] > guidance_interval[1]:
        raise ValueError(f"guidance_interval {guidance_interval!r} must be two timesteps, the lower one first")


def refuse_unsupported(arguments: Mapping[str, Any], function: Any) -> None:
    """function: has the arguments that there are, for a hint where one is misspelt."""
    known = list(inspect.signature(function).parameters)[:-1]  # without those of this function
    for name, value in arguments.items():
        if name not in _UNSUPPORTED:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"{name}: there is no such argument" + (f"; did you mean {close[0]}?" if close else ""))
        accepted, reason = _UNSUPPORTED[name]
        if not any(value is item or (not isinstance(value, Tensor) and value == item) for item in accepted):
            raise ValueError(f"{name}: {reason}")


def check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} {value!r} must be a whole number of at least 1")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} {value!r} must be a finite number")


def as_prompts(name: str, prompt: Any) -> list[str]:
    """One or more texts as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name} {prompt!r} must be a text, or a list of texts")
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{name} {text!r}: is not Unicode text; write it as UTF-8") from None
    return list(prompts)


def check_embeds(name: str, embeds: Any, num_tokens: int, width: int) -> None:
    """Text embeddings (B, T, D) that the network can read."""
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        found = embeds.dtype if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"{name} must be a tensor of floating-point numbers, and is {found}")
    if embeds.ndim != 3 or not len(embeds) or embeds.shape[1:] != (num_tokens, width):
        raise ValueError(
            f"{name} has shape {tuple(embeds.shape)}; (number of prompts, {num_tokens}, {width}) is needed"
        )
    if not embeds.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")


def check_generators(generator: Any, batch: int) -> None:
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(item, torch.Generator) for item in generators):
        raise ValueError(f"generator {generator!r} must be a torch.Generator, or a list with one for each image")
    if isinstance(generator, (list, tuple)) and len(generator) != batch:
        raise ValueError(f"there are {len(generator)} generators for {batch} images")


def check_noise(latents: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        found = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents must be a tensor of floating-point numbers, and are {found}")
    if latents.shape != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; {shape} is needed")
    if not latents.isfinite().all():
        raise ValueError("latents hold NaN or infinity")


def check_images(values: Tensor, prompt: Any) -> None:
    """Raises UserError where the latents or the pixels of an image hold NaN or infinity."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero()
    if not len(bad):
        return
    prompts = [] if prompt is None else as_prompts("prompt", prompt)
    i = int(bad[0])
    image = repr(prompts[i * len(prompts) // len(values)]) if prompts else f"image {i}"
    raise UserError(
        f"{image}: the image is NaN or infinite; in float16 try bfloat16, otherwise check the weights of the network "
        "and of the VAE"
    )
