"""The sampling loop, from noise to latents. The pipeline and the previews of training use it.

Shapes: B images, C latent channels, (h, w) latent size, T text tokens, D width of the text embeddings.
"""

import inspect
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from uvit.conventions import DiffusionPath, PredictionType
from uvit.diffusion import NUM_TIMESTEPS, add_noise, convert_prediction, from_scheduler_timestep, timestep_of_log_snr
from uvit.errors import UserError
from uvit.sample.schedulers import (
    MultistepScheduler,
    check_scheduler,
    expected_prediction,
    scale_input,
    set_timesteps,
)

ALL_TIMESTEPS = (1.0, 1000.0)
Result = TypeVar("Result")


class NetworkInput(NamedTuple):
    """What the network is asked in one step; with guidance, R = 2 B, the empty context first; otherwise R = B."""

    latents: Tensor  # (R, C, h, w), noisy, in the dtype of the network
    timesteps: Tensor  # (R,)
    context: Tensor  # (R, T, D)


def denoise(unet: Callable[[Tensor, Tensor, Tensor], Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Sample latents: `denoising`, whose arguments these are, with the predictions of a network.

    unet: (noisy latents, timesteps (B,), context) -> prediction; called in the dtype of `context`.
    """
    return run_steps(denoising(*arguments, **options), unet)


def run_steps(steps: Generator[NetworkInput, Tensor, Result], unet: Callable[..., Tensor]) -> Result:
    """Answer every input that the steps yield with the network's prediction; returns what they return."""
    try:
        inputs = next(steps)
        while True:
            with torch.no_grad():
                prediction = unet(*inputs)
            inputs = steps.send(prediction)
    except StopIteration as end:
        return end.value


@torch.no_grad()
def denoising(
    scheduler: Any,
    latents: Tensor,
    context: Tensor,
    empty_context: Tensor,
    guidance_scale: float,
    num_inference_steps: int,
    prediction_type: PredictionType,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    timestep_offset: int = 1,
    start: int = 0,
    image: Tensor | None = None,
    guidance_interval: tuple[float, float] = ALL_TIMESTEPS,
    eta: float = 0.0,
    control: Callable[[], tuple[Tensor, float] | None] | None = None,
    path: DiffusionPath = "vp",
) -> Generator[NetworkInput, Tensor, Tensor]:
    """The sampling loop, without the network: yields what to ask it, and is sent its prediction (R, C, h, w).

    So several images, each with a scheduler of its own, can share a call of the network.

    Args:
        scheduler: any diffusers scheduler for this path, with any prediction type.
        latents: (B, C, h, w), standard normal.
        context: (B, T, D), the text embeddings of the prompts.
        empty_context: those of the empty or negative prompts, (B, T, D), or (1, T, D) for all.
        guidance_scale: g in uncond + g (cond - uncond); 1 is the conditional prediction alone, at half the cost.
            Guidance acts on what the network predicts. The prediction types are affine in one another, so it makes no
            difference which of them it acts on.
        prediction_type: what the network predicts.
        generator: of the noise that DDPM adds; one for all images, or one per image.
        progress: wraps the timesteps, as tqdm does.
        on_step: (step, scheduler's timestep, latents) -> the latents to continue with.
        timestep_offset: the network gets the scheduler's timestep t as t + timestep_offset: 1 as in training, 0 for
            PaddleMIX's pipelines.
        start: the index of the scheduler's timestep to begin at, a multiple of its order.
        image: x_0 (B, C, h, w) to begin from; `latents` is then the noise to add to it. Unused if `start` is 0.
        guidance_interval: lowest and highest timestep with guidance (Kynkäänniemi et al. 2024). Outside, the
            prediction is the conditional one alone, at half the cost.
        eta: how much noise DDIM adds, from 0 to 1; for schedulers that have it.
        control: called before each step; -> the text embeddings and the guidance scale from then on, or None to stop
            here. The embeddings are (2 B, T, D), the empty ones first, or (B, T, D) without guidance.
        path: of the network.
    Returns:
        (B, C, h, w) float32: x_0, scaled as in training.
    """
    check_scheduler(scheduler, path)
    if isinstance(scheduler, MultistepScheduler):
        scheduler.guidance = (guidance_scale, *guidance_interval)  # a fitted plan is valid for one guidance only
    set_timesteps(scheduler, num_inference_steps, latents.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)  # otherwise a first timestep that rounding repeats costs a step
    parameters = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in parameters else {}
    if "eta" in parameters:
        options["eta"] = eta
    elif eta != 0:
        raise UserError(f"eta {eta:g}: {type(scheduler).__name__} has none; leave it out, or use DDIM")
    both = torch.cat([empty_context.expand_as(context), context])  # (2 B, T, D)
    lowest, highest = guidance_interval
    if lowest == ALL_TIMESTEPS[0]:
        lowest = 0.0  # a linear path has timesteps below 1

    known_timesteps = exact_timesteps(scheduler, path)  # of the network, in (0, 1000], on the CPU
    timesteps = known_timesteps.to(latents.device)
    model_timesteps = timesteps + (timestep_offset - 1)
    if image is None or start == 0:
        x = latents.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        x = at_step(scheduler, start, image, latents.float(), path)
    for i, t in enumerate(progress(scheduler.timesteps[start:]), start):
        if control is not None:
            if (now := control()) is None:
                break
            both, guidance_scale = now
        x_n = scale_input(scheduler, x, t)  # as in training
        guided = len(both) > len(x) and guidance_scale != 1 and lowest <= known_timesteps[i] <= highest
        inputs = torch.cat([x_n, x_n]) if guided else x_n
        n = model_timesteps[i].expand(len(inputs))
        prediction = yield NetworkInput(inputs.to(context.dtype), n, both if guided else both[-len(x) :])
        prediction = prediction.float()
        if guided:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + guidance_scale * (cond - uncond)
        wanted = expected_prediction(scheduler)
        prediction = convert_prediction(prediction, x_n, timesteps[i].expand(len(x_n)), prediction_type, wanted, path)
        x = scheduler.step(prediction, t, x, **options).prev_sample
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def exact_timesteps(scheduler: Any, path: DiffusionPath = "vp") -> Tensor:
    """The network's timestep, possibly fractional, at each step of the scheduler: (steps,) float32, on the CPU.

    Raises ValueError for a scheduler of which the timesteps rise.

    A scheduler with integer timesteps may use noise levels between them: on Karras' grid, diffusers rounds the
    timesteps. The exact timestep is that of the scheduler's sigma: s_n / a_n, or n / 1000 on a linear path.
    """
    timesteps = scheduler.timesteps.cpu()
    if timesteps[0] < timesteps[-1]:
        raise ValueError(f"{type(scheduler).__name__} leads from images to noise; choose another scheduler")
    if path == "linear":
        exact = timesteps.is_floating_point()
        found = timesteps.float() if exact else NUM_TIMESTEPS * scheduler.sigmas[: len(timesteps)].float().cpu()
        return found.clamp(max=NUM_TIMESTEPS)  # by rounding, some shifts begin at 1000.0001
    result = from_scheduler_timestep(timesteps, path).double()
    if not timesteps.is_floating_point() and hasattr(scheduler, "sigmas"):
        exact = timestep_of_log_snr(-2 * scheduler.sigmas[: len(timesteps)].double().cpu().log(), path)
        is_integer = (exact - result).abs() < 0.01
        result = torch.where(is_integer, result, exact)
    return result.float()


def at_step(scheduler: Any, step: int, x_0: Tensor, noise: Tensor, path: DiffusionPath = "vp") -> Tensor:
    """x_0 (B, C, h, w) with the noise level of the latents before a step, in the scheduler's scale.

    `step` must be the next step of the scheduler. After the last step there is no noise.
    """
    if step == len(scheduler.timesteps):
        return x_0
    x_n = add_noise(x_0, noise, exact_timesteps(scheduler, path)[step].expand(len(x_0)).to(x_0.device), path)
    return x_n / scale_input(scheduler, torch.ones_like(x_0), scheduler.timesteps[step])
