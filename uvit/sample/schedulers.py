"""diffusers schedulers, told of our diffusion process.

Every scheduler is built from one config, so that swapping one for another in diffusers' way,
`DDIMScheduler.from_config(pipeline.scheduler.config)`, finds in it what it needs.
"""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from uvit.diffusion import PredictionType, alphas_cumprod, scheduler_config

DEFAULT_SCHEDULER = "dpmsolver++"

# Multistep solvers of second order gain from Karras' grid (Karras et al. 2022, rho 7); Euler's and Heun's are
# better off with even steps in time.
_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmsolver++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "heun": (HeunDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
}


def build_scheduler(name: str = DEFAULT_SCHEDULER, prediction_type: PredictionType = "epsilon") -> Any:
    """The diffusers scheduler of that name.

    Args:
        name: dpmsolver++, unipc, euler, heun, ddim or ddpm.
        prediction_type: what `step` is given; `denoise` converts to it from what the network predicts.
    """
    cls, settings = _SCHEDULERS[name]
    shared = {
        **scheduler_config(prediction_type),
        "clip_sample": False,  # latents are not confined to [-1, 1], as pixels are
        "timestep_spacing": "trailing",  # from pure noise, label 1000, in even steps
        "set_alpha_to_one": True,  # DDIM's last step ends at x_0, not just before it
    }
    return cls.from_config(shared | settings)


def check_scheduler(scheduler: Any) -> None:
    """ValueError if it steps through another diffusion process than the network was trained with."""
    abar = getattr(scheduler, "alphas_cumprod", torch.empty(0)).double().cpu()
    name, ours = type(scheduler).__name__, alphas_cumprod()[1:]
    if abar.shape != ours.shape or not torch.allclose(abar, ours, rtol=1e-3):
        raise ValueError(
            f"{name} has another noise schedule than the model; "
            f"make it by {name}.from_config(pipeline.scheduler.config)"
        )
    if scheduler.config.get("clip_sample"):
        raise ValueError(f"{name} clips to [-1, 1], which latents exceed; make it with clip_sample=False")
