"""diffusers schedulers, told of our diffusion process.

Every scheduler is built from one config, so that swapping one for another in diffusers' way,
`DDIMScheduler.from_config(pipeline.scheduler.config)`, finds in it what it needs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from uvit.diffusion import NUM_TIMESTEPS, PredictionType, alphas_cumprod, log_snr, scheduler_config, timestep_of_log_snr
from uvit.errors import UserError
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


def scheduler_from_config(config: Mapping[str, Any]) -> Any:
    """The scheduler that a pipeline folder's scheduler_config.json describes: one of diffusers, or of this file.

    Raises UserError where its class is neither.
    """
    name = str(config.get("_class_name"))
    own = {cls.__name__: cls for cls in (LimitedDPMSolverScheduler, OfficialScheduler)}
    cls: Any = own.get(name) or getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        raise UserError(f"scheduler_config.json: {name} is no scheduler of diffusers")
    scheduler: Any = cls
    return scheduler.from_config({key: value for key, value in config.items() if not key.startswith("_")})


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


# A solver that is a table of numbers: a grid of noise levels, and how each step weighs what it has seen.
#
# A step is x' = w_0 x + w_1 D_0 + w_2 D_1 + ..., the latents and the x_0 predicted at this step, the one before, and so
# on. DPM-Solver++ is of this form on any grid; `uvit.sample.fit` finds better weights for a model.


KARRAS_RHO = 7


@dataclass(frozen=True)
class SolverPlan:
    """All that a solver is."""

    log_snrs: tuple[float, ...]
    """(N,), rising from label 1000's: log(a^2 / s^2) wherever the network is asked."""
    weights: tuple[tuple[float, ...], ...]
    """Of each of the N steps: of the latents, of the x_0 just predicted, of the one before, ..."""
    guidance: tuple[float, float, float] | None = None
    """What it was fitted for: scale, lowest and highest label with guidance. None: it was not, and goes for any."""


def karras_grid(num_steps: int) -> Tensor:
    """Log-SNRs (num_steps,) float64 from label 1000's to label 1's (Karras et al. 2022, rho 7).

    Most of them are at little noise; even steps in time, which have most at much noise, need more of them.
    """
    ends = log_snr(torch.tensor([NUM_TIMESTEPS, 1]))
    first, last = torch.exp(-ends / 2 / KARRAS_RHO).tolist()  # roots of the noise levels s_n / a_n
    return -2 * KARRAS_RHO * torch.linspace(first, last, num_steps, dtype=torch.float64).log()


def second_order(log_snrs: Tensor) -> SolverPlan:
    """DPM-Solver++ (2M) of Lu et al. 2022 on that grid; the first step and the last, to x_0, are of first order."""
    half = (log_snrs / 2).tolist()  # lambda = log(a / s)
    a, s = (torch.sigmoid(sign * log_snrs).sqrt().tolist() for sign in (1, -1))
    weights = []
    for i in range(len(half) - 1):
        h = half[i + 1] - half[i]
        gain = -a[i + 1] * math.expm1(-h)
        back = 0.5 * h / (half[i] - half[i - 1]) if i else 0.0
        weights.append((s[i + 1] / s[i], gain * (1 + back), -gain * back))
    return SolverPlan(tuple(log_snrs.tolist()), (*weights, (0.0, 1.0, 0.0)))


class MultistepScheduler(SchedulerMixin, ConfigMixin):
    """Steps through plans, in the way of diffusers' schedulers.

    Which of the plans is a matter of the number of steps and of `guidance`, to be set before `set_timesteps`.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, plans: Sequence[SolverPlan] = ()):
        self.register_to_config(**shared_config("sample"))
        self.plans = plans
        self.alphas_cumprod = alphas_cumprod()[1:]
        self.guidance: tuple[float, float, float] | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Raises UserError where no plan is for that."""
        self.plan = self.plan_for(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        labels = timestep_of_log_snr(torch.tensor(self.plan.log_snrs, dtype=torch.float64))
        self.timesteps = (labels - 1).float().to(device)
        self.predicted: list[Tensor] = []  # newest first
        self.step_index = 0

    def plan_for(self, num_steps: int) -> SolverPlan:
        for plan in self.plans:
            if len(plan.log_snrs) == num_steps and plan.guidance in (None, self.guidance):
                return plan
        known = (
            "; ".join(f"{len(plan.log_snrs)} for {describe_guidance(plan.guidance)}" for plan in self.plans) or "none"
        )
        raise UserError(
            f"no solver of {num_steps} steps is fitted for {describe_guidance(self.guidance)} (there are: {known}); "
            "fit it with --fit_schedule, or choose another --scheduler or --speed"
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise UserError("--scheduler fitted: begins with noise alone; choose another to begin with a picture")

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        """From the x_0 predicted and the latents, in float32, to those of the next step."""
        weights = self.plan.weights[self.step_index]
        self.predicted = [model_output, *self.predicted][: len(weights) - 1]
        self.step_index += 1
        terms = zip(weights, [sample, *self.predicted], strict=False)  # the first steps have less to look back on
        return SchedulerOutput(prev_sample=sum(weight * value for weight, value in terms))


def describe_guidance(guidance: tuple[float, float, float] | None) -> str:
    if guidance is None:
        return "any guidance"
    scale, lowest, highest = guidance
    return f"guidance {scale:g}" + ("" if (lowest, highest) == (1, NUM_TIMESTEPS) else f" at {lowest:g} to {highest:g}")
