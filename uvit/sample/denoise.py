"""From noise to latents: the sampling loop of the pipeline and of training's previews.

Shapes: B images, C latent channels, (h, w) latent size, T text tokens, D width of the context.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from uvit.diffusion import (
    PredictionType,
    add_noise,
    convert_prediction,
    label_of_scheduler_timestep,
    timestep_of_log_snr,
)
from uvit.errors import UserError
from uvit.sample.schedulers import MultistepScheduler, check_scheduler

ALL_TIMESTEPS = (1.0, 1000.0)


@torch.no_grad()
def denoise(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
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
    first_label: int = 1,
    start: int = 0,
    image: Tensor | None = None,
    guidance_interval: tuple[float, float] = ALL_TIMESTEPS,
) -> Tensor:
    """Draw latents.

    Args:
        unet: (noisy latents, labels (B,), context) -> prediction; called in the dtype of `context`.
        scheduler: any of diffusers' for this process, whatever prediction it expects.
        latents: (B, C, h, w), standard normal.
        context, empty_context: (B, T, D); that of the empty (or negative) prompt, or one for all.
        guidance_scale: g in uncond + g (cond - uncond); 1 is the conditional prediction alone, half the cost.
            Guided is the network's own prediction; parametrisations are affine in one another: it is all one.
        prediction_type: what the network predicts.
        generator: of the noise that DDPM adds; one for all, or one per image.
        progress: wraps the timesteps, as tqdm does.
        on_step: (step, scheduler's timestep, latents) -> the latents to go on with.
        first_label: what the network is told of the scheduler's timestep 0; see `timestep_labels`.
        start: begin at the scheduler's timesteps[start], a multiple of its order, ...
        image: ... from this x_0 (B, C, h, w), `latents` being the noise that is added to it; at 0 it plays no part.
        guidance_interval: lowest and highest label with guidance (Kynkäänniemi et al. 2024); elsewhere the prediction
            is the conditional one alone, at half the cost.
    Returns:
        (B, C, h, w) float32: x_0, scaled as in training.
    """
    check_scheduler(scheduler)
    if isinstance(scheduler, MultistepScheduler):
        scheduler.guidance = (guidance_scale, *guidance_interval)  # some of its plans are for one alone
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)  # or a step is lost where rounding has the first timestep there twice
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    both = torch.cat([empty_context.expand_as(context), context])  # (2 B, T, D)
    lowest, highest = guidance_interval

    labels = timestep_labels(scheduler).to(latents.device)
    told = labels + (first_label - 1)  # what the network is told; `labels` are the noise levels that it is at
    if image is None or start == 0:
        x = latents.float() * scheduler.init_noise_sigma
    else:
        x = at_step(scheduler, start, image, latents.float())
    for i, t in enumerate(progress(scheduler.timesteps[start:]), start):
        x_n = scheduler.scale_model_input(x, t)  # variance-preserving, as the network knows it
        guided = guidance_scale != 1 and lowest <= labels[i] <= highest
        inputs = torch.cat([x_n, x_n]) if guided else x_n
        prediction = unet(inputs.to(context.dtype), told[i].expand(len(inputs)), both if guided else context).float()
        if guided:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + guidance_scale * (cond - uncond)
        goal = scheduler.config.prediction_type
        prediction = convert_prediction(prediction, x_n, labels[i].expand(len(x_n)), prediction_type, goal)
        x = scheduler.step(prediction, t, x, **options).prev_sample
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def timestep_labels(scheduler: Any) -> Tensor:
    """The network's label, 1..1000, at each of the scheduler's timesteps: (steps,) float32, on the CPU.

    A scheduler whose timesteps are whole numbers may stand at a noise level in between: on Karras' grid they
    are rounded. Its sigma = s_n / a_n tells the level, for the network as for converting its prediction.
    """
    timesteps = scheduler.timesteps.cpu()
    if timesteps.min() < 0:  # rounding in diffusers' "trailing" grid: 61 steps, 103, ...
        raise UserError(
            f"--num_inference_steps {scheduler.num_inference_steps}: is a number of steps that "
            f"{type(scheduler).__name__} cannot divide evenly; choose one that divides 1000"
        )
    labels = label_of_scheduler_timestep(timesteps).double()
    if not timesteps.is_floating_point() and hasattr(scheduler, "sigmas"):
        exact = timestep_of_log_snr(-2 * scheduler.sigmas[: len(timesteps)].double().cpu().log())
        meant_whole = (exact - labels).abs() < 0.01
        labels = torch.where(meant_whole, labels, exact)
    return labels.float()


def at_step(scheduler: Any, step: int, x_0: Tensor, noise: Tensor) -> Tensor:
    """x_0 (B, C, h, w) with as much noise as latents have before a step, the next to be done, in the scheduler's scale.

    After the last step there is none.
    """
    if step == len(scheduler.timesteps):
        return x_0
    x_n = add_noise(x_0, noise, timestep_labels(scheduler)[step].expand(len(x_0)).to(x_0.device))
    return x_n / scheduler.scale_model_input(torch.ones_like(x_0), scheduler.timesteps[step])
