"""Fits a solver to a model, so that few steps follow the probability flow (`uvit sample --fit_schedule`).

1. `solve` solves the probability flow once, in many steps: the reference.
2. `fit_plan` samples with few steps. Before each step, it fits the weights of the step by least squares, so that the
   step ends as close as possible to the reference. A later step starts from the latents that earlier steps gave, so it
   also corrects part of their error. Fitting needs no more network evaluations than sampling.
3. `store_plan` and `read_plans` keep the fitted solvers in the pipeline folder.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from uvit.conventions import DiffusionPath
from uvit.errors import UserError
from uvit.io import write_json
from uvit.sample.schedulers import MultistepScheduler, SolverPlan, second_order, solver_grid

NUM_PREDICTIONS = 3  # of x_0 that a step uses: its own and the two before it
NUM_REFERENCE_STEPS = 300
FITTED_FILE = Path("scheduler") / "fitted.json"  # in the pipeline folder

# (scheduler, number of steps) -> latents (B, C, h, w), always from the same prompts and noise.
SampleLatents = Callable[[MultistepScheduler, int], Tensor]


@dataclass(frozen=True)
class Reference:
    """A close solution of a model's probability flow."""

    latents: Tensor  # (NUM_REFERENCE_STEPS, B, C, h, w), before each step of the path's grid, on the CPU
    x_0: Tensor  # (B, C, h, w)
    path: DiffusionPath = "vp"

    def at(self, num_steps: int) -> list[Tensor]:
        """The latents before each step of the path's grid of `num_steps` steps, by cubic interpolation."""
        last, result = len(self.latents) - 1, []
        first = int(self.path == "vp_zero_snr")  # where Karras' grid begins
        if self.path == "linear":
            positions = [i / num_steps * len(self.latents) for i in range(num_steps)]
        else:
            steps = num_steps - 1 - first
            positions = [0.0] * first + [first + i / max(steps, 1) * (last - first) for i in range(steps + 1)]
        for position in positions:
            left = min(max(int(position) - 1, first if position else 0), last - 3)
            coefficients = torch.ones(4, dtype=torch.float64)
            for j, k in itertools.permutations(range(4), 2):
                coefficients[j] *= (position - left - k) / (j - k)
            result.append(torch.einsum("s,s...->...", coefficients, self.latents[left : left + 4].double()))
        return result


def solve(sample_latents: SampleLatents, path: DiffusionPath = "vp") -> Reference:
    recorder = Recorder([second_order(solver_grid(NUM_REFERENCE_STEPS, path), path)], path)
    x_0 = sample_latents(recorder, NUM_REFERENCE_STEPS)
    return Reference(torch.stack(recorder.latents), x_0, path)


class Recorder(MultistepScheduler):
    """Records the latents before each step."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.latents: list[Tensor] = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        self.latents.append(sample.cpu())
        return super().step(model_output, timestep, sample)


class Fitter(MultistepScheduler):
    """Fits the weights of each step, so that it ends as close as possible to `targets[step]`."""

    def __init__(self, plan: SolverPlan, targets: list[Tensor]):
        super().__init__([plan], plan.path)
        self.targets = targets

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        i = self.step_index
        terms = [sample, model_output, *self.predicted][: 1 + NUM_PREDICTIONS]
        prior = [*self.plan.weights[i], *[0.0] * NUM_PREDICTIONS][: len(terms)]
        fitted = tuple(least_squares(terms, self.targets[i], prior))
        weights = self.plan.weights
        padded = (*fitted, *[0.0] * (1 + NUM_PREDICTIONS - len(fitted)))
        self.plan = replace(self.plan, weights=(*weights[:i], padded, *weights[i + 1 :]))
        return super().step(model_output, timestep, sample)


def least_squares(terms: list[Tensor], target: Tensor, prior: list[float], ridge: float = 1e-6) -> list[float]:
    """The weights whose weighted sum of the terms, (B, ...) each, is closest to the target.

    Minimises the sum of the root mean square errors of the images, not of their squares. Where the flow forks, one
    image may take the other branch; this keeps it from dominating the fit.

    Args:
        prior: the weights that a ridge penalty pulls towards.
    """
    X = torch.stack([term.double().cpu().flatten(1) for term in terms], dim=-1)  # (B, n, terms)
    start = torch.tensor(prior, dtype=torch.float64)
    Y = target.double().cpu().flatten(1) - X @ start  # (B, n)
    change, importance = torch.zeros_like(start), torch.ones(len(X), dtype=torch.float64)
    for _ in range(5):  # iteratively reweighted
        scaled = X * importance[:, None, None]
        gram = torch.einsum("bnp,bnq->pq", scaled, X)
        gram += ridge * gram.diagonal().mean() * torch.eye(len(start), dtype=torch.float64)
        change = torch.linalg.solve(gram, torch.einsum("bnp,bn->p", scaled, Y))
        importance = 1 / ((Y - X @ change).square().mean(dim=1) + 1e-8).sqrt()
    return (start + change).tolist()


def fit_plan(
    sample_latents: SampleLatents, reference: Reference, num_steps: int, guidance: tuple[float, float, float]
) -> tuple[SolverPlan, Tensor]:
    """Fit a plan of `num_steps` steps, at least 2. -> (the plan, the latents that it gives)"""
    targets = [*reference.at(num_steps)[1:], reference.x_0]
    fitter = Fitter(second_order(solver_grid(num_steps, reference.path), reference.path), targets)
    latents = sample_latents(fitter, num_steps)
    return replace(fitter.plan, guidance=guidance), latents


def relative_error(latents: Tensor, reference: Tensor) -> float:
    """Root mean square distance, divided by the root mean square of the reference."""
    return ((latents - reference).square().mean() / reference.square().mean()).sqrt().item()


def read_plans(pipeline: Path) -> list[SolverPlan]:
    """The plans stored in a pipeline folder. Raises UserError if their file cannot be read."""
    path = pipeline / FITTED_FILE
    if not path.is_file():
        return []
    try:
        return [parse_plan(stored) for stored in json.loads(path.read_text(encoding="utf-8"))["plans"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and fit again with --fit_schedule") from None


def parse_plan(stored: dict[str, Any]) -> SolverPlan:
    """Raises KeyError, TypeError or ValueError if this is not a plan."""
    log_snrs = tuple(map(float, stored["log_snrs"]))
    weights = tuple(tuple(map(float, row)) for row in stored["weights"])
    if len(weights) != len(log_snrs) or not all(map(math.isfinite, [*log_snrs, *itertools.chain(*weights)])):
        raise ValueError("a plan needs a row of finite weights for each step")
    scale, lowest, highest = map(float, stored["guidance"])
    path = stored.get("path", "vp")
    if path not in get_args(DiffusionPath):
        raise ValueError(f"path {path!r} is none of {', '.join(get_args(DiffusionPath))}")
    return SolverPlan(log_snrs, weights, (scale, lowest, highest), path)


def store_plan(pipeline: Path, plan: SolverPlan) -> Path:
    """Add a plan to a pipeline folder; it replaces the plan of the same steps and guidance. -> the file"""
    others = [
        other
        for other in read_plans(pipeline)
        if (len(other.log_snrs), other.guidance, other.path) != (len(plan.log_snrs), plan.guidance, plan.path)
    ]
    path = pipeline / FITTED_FILE
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"plans": [asdict(each) for each in [*others, plan]]}, indent=1)
    return path
