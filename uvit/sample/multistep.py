"""A solver that is a table of numbers: a grid of noise levels, and how each step weighs what it has seen.

A step is x' = w_0 x + w_1 D_0 + w_2 D_1 + ..., the latents and the x_0 predicted at this step, the one before, and so
on. DPM-Solver++ is of this form on any grid; `uvit.sample.fit` finds better weights for a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from uvit.diffusion import NUM_TIMESTEPS, alphas_cumprod, log_snr, timestep_of_log_snr
from uvit.errors import UserError
from uvit.sample.schedulers import shared_config

KARRAS_RHO = 7


@dataclass(frozen=True)
class Plan:
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


def second_order(log_snrs: Tensor) -> Plan:
    """DPM-Solver++ (2M) of Lu et al. 2022 on that grid; the first step and the last, to x_0, are of first order."""
    half = (log_snrs / 2).tolist()  # lambda = log(a / s)
    a, s = (torch.sigmoid(sign * log_snrs).sqrt().tolist() for sign in (1, -1))
    weights = []
    for i in range(len(half) - 1):
        h = half[i + 1] - half[i]
        gain = -a[i + 1] * math.expm1(-h)
        back = 0.5 * h / (half[i] - half[i - 1]) if i else 0.0
        weights.append((s[i + 1] / s[i], gain * (1 + back), -gain * back))
    return Plan(tuple(log_snrs.tolist()), (*weights, (0.0, 1.0, 0.0)))


class MultistepScheduler(SchedulerMixin, ConfigMixin):
    """Steps through plans, in the way of diffusers' schedulers.

    Which of the plans is a matter of the number of steps and of `guidance`, to be set before `set_timesteps`.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, plans: Sequence[Plan] = ()):
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

    def plan_for(self, num_steps: int) -> Plan:
        for plan in self.plans:
            if len(plan.log_snrs) == num_steps and plan.guidance in (None, self.guidance):
                return plan
        known = "; ".join(f"{len(plan.log_snrs)} for {in_words(plan.guidance)}" for plan in self.plans) or "none"
        raise UserError(
            f"no solver of {num_steps} steps is fitted for {in_words(self.guidance)} (there are: {known}); fit it with "
            "--fit_schedule, or choose another --scheduler or --speed"
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


def in_words(guidance: tuple[float, float, float] | None) -> str:
    if guidance is None:
        return "any guidance"
    scale, lowest, highest = guidance
    return f"guidance {scale:g}" + ("" if (lowest, highest) == (1, NUM_TIMESTEPS) else f" at {lowest:g} to {highest:g}")
