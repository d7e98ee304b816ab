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
    convert_prediction,
    label_of_scheduler_timestep,
    timestep_of_log_snr,
)
from uvit.errors import UserError
from uvit.sample.schedulers import check_scheduler


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
    Returns:
        (B, C, h, w) float32: x_0, scaled as in training.
    """
    check_scheduler(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # or a step is lost where rounding has the first timestep there twice
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    guided = guidance_scale != 1
    if guided:
        context = torch.cat([empty_context.expand_as(context), context])  # (2 B, T, D)

    labels = timestep_labels(scheduler).to(latents.device)
    x = latents.float() * scheduler.init_noise_sigma
    for i, t in enumerate(progress(scheduler.timesteps)):
        x_n = scheduler.scale_model_input(x, t)  # variance-preserving, as the network knows it
        inputs = torch.cat([x_n, x_n]) if guided else x_n
        prediction = unet(inputs.to(context.dtype), labels[i].expand(len(inputs)), context).float()
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
