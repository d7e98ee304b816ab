"""Schedulers of `uvit sample --scheduler`.

- By name: `build_scheduler` builds diffusers' schedulers for our noise schedule. All are built from one config, so
  they can be exchanged as in diffusers: `DDIMScheduler.from_config(pipeline.scheduler.config)`.
- `OfficialScheduler`: the solver of U-ViT's published results.
- `MultistepScheduler`: fitted solvers, as tables of weights (`SolverPlan`). `uvit.sample.fit` fits them.

The default, with damping, is in `uvit.sample.limited`.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from uvit.conventions import PREDICTION_TYPES, DiffusionPath, PredictionType
from uvit.diffusion import (
    NUM_TIMESTEPS,
    alphas_cumprod,
    from_scheduler_timestep,
    log_snr,
    scheduler_config,
    split_log_snr,
    timestep_of_log_snr,
)
from uvit.errors import UserError
from uvit.sample.limited import LimitedDPMSolverScheduler

DEFAULT_SCHEDULER: Final = "dpmsolver++"


# The official solver


class OfficialScheduler(DPMSolverSinglestepScheduler):
    """The sampler of U-ViT's published results: singlestep DPM-Solver++ (Lu et al. 2022), "fast", of order 3.

    The network is evaluated once at each timestep. Three evaluations make a third-order step; the last two or one make
    a second- or first-order step. The timesteps are fractional, at equal distances from 1000 to 1. The result keeps
    the small amount of noise of timestep 1.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        timesteps = torch.linspace(NUM_TIMESTEPS, 1, num_inference_steps + 1, dtype=torch.float64)
        self.sigmas = torch.exp(-log_snr(timesteps) / 2).float()  # s_n / a_n
        self.timesteps = (timesteps[:-1] - 1).float().to(device)

    def singlestep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *args: Any, sample: Any = None, **kwargs: Any
    ) -> Tensor:
        """As diffusers', except before the third evaluation of a step: the slope of x_0 is integrated exactly there."""
        i = self.step_index
        if i + 1 == len(self.order_list) or self.order_list[i + 1] != 3:
            return super().singlestep_dpm_solver_second_order_update(model_output_list, *args, sample=sample, **kwargs)
        first, between, last = self.sigmas[i - 1 : i + 2].double()
        h = (first / last).log()
        slope = (model_output_list[-1] - model_output_list[-2]) / (first / between).log()
        x_0 = model_output_list[-2] * -torch.expm1(-h) + slope * (torch.expm1(-h) + h)
        return ((last / first) * (1 + first**2).sqrt() * sample + x_0) / (1 + last**2).sqrt()


# By name

# Second-order multistep solvers are better on Karras' grid (Karras et al. 2022, rho 7), Euler and Heun with time steps
# of equal size.
_VP: dict[str, tuple[Any, dict[str, Any]]] = {
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
# By path. UniPC has no grid of its own for zero terminal SNR (see uvit.sample.limited): it takes even time steps there.
_SCHEDULERS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "vp": _VP,
    "vp_zero_snr": {
        **{name: entry for name, entry in _VP.items() if name not in ("heun", "official")},  # diffusers' have no such
        "unipc": (UniPCMultistepScheduler, {}),
    },
    "linear": {
        "dpmsolver++": (LimitedDPMSolverScheduler, {}),
        "unipc": (UniPCMultistepScheduler, {}),
        "euler": (FlowMatchEulerDiscreteScheduler, {}),
        "heun": (FlowMatchHeunDiscreteScheduler, {}),
    },
}
FLOW_MATCHING = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def scheduler_names(path: DiffusionPath) -> list[str]:
    """The schedulers that sample a path, but for `fitted`, which needs solvers of its own."""
    return [*_SCHEDULERS[path]]


def build_scheduler(
    name: str = DEFAULT_SCHEDULER,
    prediction_type: PredictionType | None = None,
    path: DiffusionPath = "vp",
    shift: float = 1.0,
) -> Any:
    """Build a scheduler. Raises UserError if it cannot sample the path.

    Args:
        name: dpmsolver++, unipc, euler, heun, ddim, ddpm or official.
        prediction_type: what `step` expects. `denoise` converts the network's prediction to it.
        path: of the network.
        shift: moves the steps of a linear path to more noise (above 1) or less; see --timestep_shift of `uvit train`.
    """
    known = _SCHEDULERS[path]
    if name not in known:
        raise UserError(f"--scheduler {name}: cannot sample a model of path {path}; use {', '.join(known)} or fitted")
    cls, settings = known[name]
    if cls in FLOW_MATCHING:  # they share no settings with the others
        return cls(NUM_TIMESTEPS, shift)
    return cls.from_config(shared_config(prediction_type, path, shift) | settings)


def shared_config(
    prediction_type: PredictionType | None = None, path: DiffusionPath = "vp", shift: float = 1.0
) -> dict[str, Any]:
    """The config that all schedulers of a path are built from. Each uses the settings that it knows."""
    return {
        **scheduler_config(prediction_type, path),
        "clip_sample": False,  # latents are not limited to [-1, 1]
        "timestep_spacing": "trailing",  # from pure noise, timestep 1000, in equal steps
        "set_alpha_to_one": True,  # DDIM's last step ends at x_0, not just before it
        **({"flow_shift": shift} if path == "linear" else {}),
    }


def steps_shift(scheduler: Any) -> float:
    """The `shift` that a scheduler was built with, or 1."""
    return float(scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)))


def set_timesteps(scheduler: Any, num_inference_steps: int, device: Any = None) -> None:
    """Set the steps of a scheduler: from pure noise to x_0. Raises UserError if it cannot make so many."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # as its pipelines do; its own grid wastes a step
        even = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=even.tolist(), device=device)
    elif num_inference_steps == 1 and isinstance(scheduler, (EulerDiscreteScheduler, HeunDiscreteScheduler)):
        # A grid from 0 to 999 with one point has the wrong end.
        scheduler.set_timesteps(timesteps=[NUM_TIMESTEPS - 1], device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    if scheduler.timesteps.min() < 0:  # rounding in diffusers' "trailing" grid: 61 steps, 103, ...
        raise UserError(
            f"--num_inference_steps {num_inference_steps}: {type(scheduler).__name__} cannot space so many steps "
            "evenly; choose a number that divides 1000"
        )


def scale_input(scheduler: Any, latents: Tensor, t: Any) -> Tensor:
    """The scheduler's latents -> x_n, as in training."""
    return latents if isinstance(scheduler, FLOW_MATCHING) else scheduler.scale_model_input(latents, t)


def expected_prediction(scheduler: Any) -> PredictionType:
    """The prediction that the scheduler's `step` takes."""
    return "flow_prediction" if isinstance(scheduler, FLOW_MATCHING) else scheduler.config.prediction_type


def scheduler_from_config(config: Mapping[str, Any]) -> Any:
    """The scheduler of a pipeline folder's scheduler_config.json, one of diffusers' or ours.

    Raises UserError if its class is neither.
    """
    name = str(config.get("_class_name"))
    own = {cls.__name__: cls for cls in (LimitedDPMSolverScheduler, OfficialScheduler)}
    cls: Any = own.get(name) or getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        raise UserError(f"scheduler_config.json: {name} is no scheduler of diffusers")
    scheduler: Any = cls
    return scheduler.from_config({key: value for key, value in config.items() if not key.startswith("_")})


# Settings that are for models with another diffusion process, and the values for this one.
_NEEDED_SETTINGS = {
    "thresholding": False,  # x_0 is not limited to [-1, 1]
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "interpolation_type": "linear",  # otherwise Euler's sigmas are not those of its timesteps
}
_NEEDED_IF_LINEAR = {
    "thresholding": False,
    "use_karras_sigmas": False,  # and others, which would replace the even steps by those of a vp path
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,  # by the size of the image; this one is set by `shift`
    "invert_sigmas": False,
}


def check_scheduler(scheduler: Any, path: DiffusionPath = "vp") -> None:
    """Raises ValueError if the scheduler has another diffusion process than the network was trained with."""
    name, config = type(scheduler).__name__, scheduler.config
    if path == "linear":
        if not follows_flow(scheduler):
            raise ValueError(
                f"{name} does not sample a model of path linear; use FlowMatchEulerDiscreteScheduler, "
                "FlowMatchHeunDiscreteScheduler, or DPMSolverMultistepScheduler or UniPCMultistepScheduler with "
                "use_flow_sigmas=True"
            )
    else:
        abar, trained = (
            getattr(scheduler, "alphas_cumprod", torch.empty(0)).double().cpu(),
            alphas_cumprod(path=path)[1:],
        )
        # The last one of zero SNR is 0 in some of diffusers' schedulers, and 2^-24 in the others and here.
        if abar.shape != trained.shape or not torch.allclose(abar, trained, rtol=1e-3, atol=1e-7):
            raise ValueError(
                f"{name} has another noise schedule than the model; "
                f"create it with {name}.from_config(pipeline.scheduler.config)"
            )
    if config.get("clip_sample") and not isinstance(scheduler, FLOW_MATCHING):
        raise ValueError(f"{name} clips to [-1, 1], but latents exceed that; create it with clip_sample=False")
    for key, needed in (_NEEDED_IF_LINEAR if path == "linear" else _NEEDED_SETTINGS).items():
        if (found := config.get(key, needed)) != needed:
            raise ValueError(f"{name} has {key}={found!r}, which is for other models; create it with {key}={needed!r}")
    if (wanted := expected_prediction(scheduler)) not in PREDICTION_TYPES[path]:
        raise ValueError(
            f"{name} expects prediction type {wanted}, to which no prediction of a U-ViT of path {path} can be "
            f"converted; create it with prediction_type={PREDICTION_TYPES[path][0]!r}"
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(f"{name} expects a variance (variance_type), which a U-ViT does not predict")


def follows_flow(scheduler: Any) -> bool:
    """Whether the scheduler's latents are (1 - t) x_0 + t noise."""
    if isinstance(scheduler, MultistepScheduler):
        return scheduler.path == "linear"
    knows = "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters  # others ignore the setting
    return isinstance(scheduler, FLOW_MATCHING) or (knows and bool(scheduler.config.use_flow_sigmas))


# Fitted solvers: tables of weights
#
# A step is a weighted sum x' = w_0 x + w_1 D_0 + w_2 D_1 + ... of the latents x and of the x_0 predicted at this step
# (D_0), at the one before (D_1), and so on. DPM-Solver++ has this form on any grid. `uvit.sample.fit` fits the weights
# to a model.

KARRAS_RHO = 7


@dataclass(frozen=True)
class SolverPlan:
    """A solver as a table: a grid of noise levels and the weights of each step."""

    log_snrs: tuple[float, ...]
    """(N,), log(a^2 / s^2) at each step, rising from that of timestep 1000."""
    weights: tuple[tuple[float, ...], ...]
    """For each of the N steps: of the latents, of the x_0 predicted at this step, of the one before, ..."""
    guidance: tuple[float, float, float] | None = None
    """The guidance that it was fitted for: scale, lowest and highest timestep. None: not fitted, valid for any."""
    path: DiffusionPath = "vp"
    """Of the network."""


def karras_grid(num_steps: int) -> Tensor:
    """Log-SNRs (num_steps,) float64, from that of timestep 1000 to that of timestep 1 (Karras et al. 2022, rho 7).

    Most steps are at low noise. Time steps of equal size have most steps at high noise, and need more of them.
    """
    ends = log_snr(torch.tensor([NUM_TIMESTEPS, 1]))
    first, last = torch.exp(-ends / 2 / KARRAS_RHO).tolist()  # roots of the noise levels s_n / a_n
    return -2 * KARRAS_RHO * torch.linspace(first, last, num_steps, dtype=torch.float64).log()


def solver_grid(num_steps: int, path: DiffusionPath) -> Tensor:
    """The grid of fitted solvers: log-SNRs (num_steps,) float64, rising.

    vp: `karras_grid`. vp_zero_snr: pure noise, and then `karras_grid` of vp. linear: even timesteps, which end one step
    before x_0. They begin at 999, because the log-SNR of pure noise is not finite.
    """
    if path == "vp":
        return karras_grid(num_steps)
    if path == "vp_zero_snr":
        return torch.cat([log_snr(torch.tensor([NUM_TIMESTEPS]), path), karras_grid(num_steps - 1)])
    return log_snr(torch.linspace(NUM_TIMESTEPS - 1, 0, num_steps + 1, dtype=torch.float64)[:-1], path)


def second_order(log_snrs: Tensor, path: DiffusionPath = "vp") -> SolverPlan:
    """DPM-Solver++ (2M) of Lu et al. 2022 on a grid. The first step and the last, to x_0, are of first order."""
    half = (log_snrs / 2).tolist()  # lambda = log(a / s)
    a, s = (values.tolist() for values in split_log_snr(log_snrs, path))
    weights = []
    for i in range(len(half) - 1):
        h = half[i + 1] - half[i]
        gain = -a[i + 1] * math.expm1(-h)
        back = 0.5 * h / (half[i] - half[i - 1]) if i else 0.0
        weights.append((s[i + 1] / s[i], gain * (1 + back), -gain * back))
    return SolverPlan(tuple(log_snrs.tolist()), (*weights, (0.0, 1.0, 0.0)), path=path)


class MultistepScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that follows plans.

    The number of steps and `guidance`, which must be set before `set_timesteps`, select the plan.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, plans: Sequence[SolverPlan] = (), path: DiffusionPath = "vp"):
        self.register_to_config(**shared_config("sample", path))
        self.plans, self.path = [plan for plan in plans if plan.path == path], path
        self.alphas_cumprod = alphas_cumprod(path=path)[1:]
        self.guidance: tuple[float, float, float] | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Raises UserError if there is no plan for this number of steps and this guidance."""
        self.plan = self.plan_for(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        timesteps = timestep_of_log_snr(torch.tensor(self.plan.log_snrs, dtype=torch.float64), self.path)
        self.timesteps = (timesteps - from_scheduler_timestep(torch.zeros(()), self.path)).float().to(device)
        self.predicted: list[Tensor] = []  # newest first
        self.step_index = 0

    def plan_for(self, num_steps: int) -> SolverPlan:
        for plan in self.plans:
            if len(plan.log_snrs) == num_steps and plan.guidance in (None, self.guidance):
                return plan
        fitted = (
            "; ".join(f"{len(plan.log_snrs)} for {describe_guidance(plan.guidance)}" for plan in self.plans) or "none"
        )
        raise UserError(
            f"no solver of {num_steps} steps is fitted for {describe_guidance(self.guidance)} (fitted: {fitted}); "
            "fit it with --fit_schedule, or choose another --scheduler or --speed"
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise UserError(
                "--scheduler fitted: starts from pure noise; choose another scheduler to begin with an image"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        """The predicted x_0 and the latents, in float32 -> the latents of the next step."""
        weights = self.plan.weights[self.step_index]
        self.predicted = [model_output, *self.predicted][: len(weights) - 1]
        self.step_index += 1
        terms = zip(weights, [sample, *self.predicted], strict=False)  # the first steps have fewer predictions
        return SchedulerOutput(prev_sample=sum(weight * value for weight, value in terms))


def describe_guidance(guidance: tuple[float, float, float] | None) -> str:
    if guidance is None:
        return "any guidance"
    scale, lowest, highest = guidance
    return f"guidance {scale:g}" + ("" if (lowest, highest) == (1, NUM_TIMESTEPS) else f" at {lowest:g} to {highest:g}")
