"""Callbacks after each step, as in diffusers: what they get, and what they may change.

Shapes: B images, T text tokens, D width of the text embeddings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from uvit.errors import a_type

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def callback_inputs(callback: Any, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the tensors that a callback gets. Raises ValueError where there is no such tensor."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    elif callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end {callback!r} must be a function")
    names = names or ()
    if unknown := [name for name in names if name not in CALLBACK_TENSORS]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs {unknown}: there are only {', '.join(CALLBACK_TENSORS)}, in a list"
        )
    return tuple(names)


class Steps:
    """What happens between the steps of one call of a pipeline.

    Attributes:
        pipeline: its `_interrupt` and `_guidance_scale`, which a callback may set, count from the next step on.
        embeds: (2 B, T, D), the negative ones first; without guidance, (B, T, D).
        keep: (step, latents) -> latents, before the callback.
    """

    def __init__(
        self,
        pipeline: Any,
        negative: Tensor,
        context: Tensor,
        start: int,
        callback: Any,
        inputs: tuple[str, ...],
        keep: Callable[[int, Tensor], Tensor],
    ):
        guides = pipeline._guidance_scale != 1
        self.pipeline, self.start, self.callback, self.inputs, self.keep = pipeline, start, callback, inputs, keep
        self.negative = negative if guides else None
        self.embeds = torch.cat([negative, context]) if guides else context

    def before(self) -> tuple[Tensor, float] | None:
        """`denoise`'s control."""
        self.pipeline._num_timesteps = len(self.pipeline.scheduler.timesteps) - self.start
        return None if self.pipeline._interrupt else (self.embeds, self.pipeline._guidance_scale)

    def after(self, i: int, t: Tensor, latents: Tensor) -> Tensor:
        """`denoise`'s on_step."""
        latents = self.keep(i, latents)
        if self.callback is None:
            return latents
        tensors = dict(zip(CALLBACK_TENSORS, (latents, self.embeds, self.negative), strict=True))
        given = {name: tensors[name] for name in self.inputs}
        changed = callback_result(self.callback(self.pipeline, i - self.start, t, given), tensors)
        self.embeds = changed.get("prompt_embeds", self.embeds)
        return changed.get("latents", latents)


def callback_result(result: Any, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What a callback returned in place of `tensors`: nothing, or some of them, of the same shapes.

    Without its first half, `prompt_embeds` ends guidance, as in diffusers.
    """
    if result is None:
        return {}
    if not isinstance(result, dict) or (unknown := set(result) - set(CALLBACK_TENSORS)):
        found = f"the keys {sorted(map(str, unknown))}" if isinstance(result, dict) else a_type(result)
        raise ValueError(
            f"callback_on_step_end returned {found}; return None, or a dict of {', '.join(CALLBACK_TENSORS)}"
        )
    latents, changed = tensors["latents"], {}
    assert latents is not None
    for name, value in result.items():
        old = tensors[name]
        if value is old:
            continue
        if old is None or not isinstance(value, Tensor):
            raise ValueError(f"callback_on_step_end returned {name} of type {type(value).__name__}; return a tensor")
        halves = (
            (len(old), len(old) // 2)
            if name == "prompt_embeds" and tensors["negative_prompt_embeds"] is not None
            else (len(old),)
        )
        if value.shape[1:] != old.shape[1:] or len(value) not in halves:
            raise ValueError(
                f"callback_on_step_end returned {name} of shape {tuple(value.shape)}; {tuple(old.shape)} is needed"
            )
        changed[name] = value.to(old)
    return changed
