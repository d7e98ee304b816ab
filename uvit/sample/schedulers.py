"""diffusers schedulers, told of our diffusion process.

Every scheduler is built from one config, so that swapping one for another in diffusers' way,
`DDIMScheduler.from_config(pipeline.scheduler.config)`, finds in it what it needs.
"""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from uvit.diffusion import NUM_TIMESTEPS, PredictionType, alphas_cumprod, log_snr, scheduler_config
from uvit.sample.limited import LimitedDPMSolverScheduler

DEFAULT_SCHEDULER = "dpmsolver++"


class OfficialScheduler(DPMSolverSinglestepScheduler):
    """The sampler of U-ViT's published results: singlestep DPM-Solver++ (Lu et al. 2022), "fast", of order 3.

    Each timestep is one evaluation of the network. Three make a step of third order, the last two or one a step of
    second or first; they stand at even, fractional labels from 1000 down. The latents end at label 1, with the little
    noise of that level left in.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        labels = torch.linspace(NUM_TIMESTEPS, 1, num_inference_steps + 1, dtype=torch.float64)
        self.sigmas = torch.exp(-log_snr(labels) / 2).float()  # s_n / a_n
        self.timesteps = (labels[:-1] - 1).float().to(device)

    def singlestep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *args: Any, sample: Any = None, **kwargs: Any
    ) -> Tensor:
        """Towards the third evaluation of a step x_0's slope is integrated; diffusers takes it at the middle."""
        i = self.step_index
        if i + 1 == len(self.order_list) or self.order_list[i + 1] != 3:
            return super().singlestep_dpm_solver_second_order_update(model_output_list, *args, sample=sample, **kwargs)
        first, between, last = self.sigmas[i - 1 : i + 2].double()
        h = (first / last).log()
        slope = (model_output_list[-1] - model_output_list[-2]) / (first / between).log()
        x_0 = model_output_list[-2] * -torch.expm1(-h) + slope * (torch.expm1(-h) + h)
        return ((last / first) * (1 + first**2).sqrt() * sample + x_0) / (1 + last**2).sqrt()


# Multistep solvers of second order gain from Karras' grid (Karras et al. 2022, rho 7); Euler's and Heun's are
# better off with even steps in time.
_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmsolver++": (LimitedDPMSolverScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "heun": (HeunDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "official": (
        OfficialScheduler,
        {"solver_order": 3, "lower_order_final": True, "final_sigmas_type": "sigma_min"},
    ),
}


def build_scheduler(name: str = DEFAULT_SCHEDULER, prediction_type: PredictionType = "epsilon") -> Any:
    """The diffusers scheduler of that name.

    Args:
        name: dpmsolver++, unipc, euler, heun, ddim, ddpm or official.
        prediction_type: what `step` is given; `denoise` converts to it from what the network predicts.
    """
    cls, settings = _SCHEDULERS[name]
    return cls.from_config(shared_config(prediction_type) | settings)


def shared_config(prediction_type: PredictionType) -> dict[str, Any]:
    """What all are built from, of which each takes what it knows."""
    return {
        **scheduler_config(prediction_type),
        "clip_sample": False,  # latents are not confined to [-1, 1], as pixels are
        "timestep_spacing": "trailing",  # from pure noise, label 1000, in even steps
        "set_alpha_to_one": True,  # DDIM's last step ends at x_0, not just before it
    }


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
