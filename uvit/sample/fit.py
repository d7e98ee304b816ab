"""Fit a solver to a model: weights with which few steps follow its own trajectories (`uvit sample --fit_schedule`).

The probability flow is solved once in many steps. Then each of the few steps gets, by least squares, those weights
that bring it closest to where the flow was at the end of that step. What later steps find is what earlier ones did, so
they mend some of it. Fitting a step asks the network no more than drawing with it.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from uvit.errors import UserError
from uvit.io import write_json
from uvit.sample.schedulers import MultistepScheduler, SolverPlan, karras_grid, second_order

NUM_PREDICTIONS = 3  # that a step looks back on
NUM_REFERENCE_STEPS = 300
FITTED_FILE = Path("scheduler") / "fitted.json"  # in a pipeline's folder

Draw = Callable[[MultistepScheduler, int], Tensor]


@dataclass(frozen=True)
class Reference:
    """The flow that a model draws along, solved closely."""

    latents: Tensor  # (NUM_REFERENCE_STEPS, B, C, h, w), at Karras' noise levels, on the CPU
    x_0: Tensor  # (B, C, h, w)

    def at(self, num_steps: int) -> list[Tensor]:
        """The latents at the levels of Karras' grid of so many steps: between the four closest, a cubic."""
        last, found = len(self.latents) - 1, []
        for i in range(num_steps):
            place = i / (num_steps - 1) * last
            left = min(max(int(place) - 1, 0), last - 3)
            shares = torch.ones(4, dtype=torch.float64)
            for j, k in itertools.permutations(range(4), 2):
                shares[j] *= (place - left - k) / (j - k)
            found.append(torch.einsum("s,s...->...", shares, self.latents[left : left + 4].double()))
        return found


def solve(draw: Draw) -> Reference:
    recorder = Recorder([second_order(karras_grid(NUM_REFERENCE_STEPS))])
    x_0 = draw(recorder, NUM_REFERENCE_STEPS)
    return Reference(torch.stack(recorder.latents), x_0)


class Recorder(MultistepScheduler):
    """Keeps the latents before each step."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.latents: list[Tensor] = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        self.latents.append(sample.cpu())
        return super().step(model_output, timestep, sample)


class Fitter(MultistepScheduler):
    """Replaces each step's weights by those that lead closest to `goals[step]`."""

    def __init__(self, plan: SolverPlan, goals: list[Tensor]):
        super().__init__([plan])
        self.goals = goals

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        i = self.step_index
        seen = [sample, model_output, *self.predicted][: 1 + NUM_PREDICTIONS]
        prior = [*self.plan.weights[i], *[0.0] * NUM_PREDICTIONS][: len(seen)]
        fitted = tuple(least_squares(seen, self.goals[i], prior))
        weights = self.plan.weights
        padded = (*fitted, *[0.0] * (1 + NUM_PREDICTIONS - len(fitted)))
        self.plan = replace(self.plan, weights=(*weights[:i], padded, *weights[i + 1 :]))
        return super().step(model_output, timestep, sample)


def least_squares(terms: list[Tensor], goal: Tensor, prior: list[float], ridge: float = 1e-6) -> list[float]:
    """Weights with which the terms, (B, ...) each, sum up to the goal.

    What is minimised is the sum of the images' root mean square errors, not of their squares: at a fork of the flow a
    picture may go the other way, and no weight of others' should be spent on it.
    """
    X = torch.stack([term.double().cpu().flatten(1) for term in terms], dim=-1)  # (B, n, terms)
    start = torch.tensor(prior, dtype=torch.float64)
    Y = goal.double().cpu().flatten(1) - X @ start  # (B, n)
    change, importance = torch.zeros_like(start), torch.ones(len(X), dtype=torch.float64)
    for _ in range(5):  # iteratively reweighted
        scaled = X * importance[:, None, None]
        gram = torch.einsum("bnp,bnq->pq", scaled, X)
        gram += ridge * gram.diagonal().mean() * torch.eye(len(start), dtype=torch.float64)
        change = torch.linalg.solve(gram, torch.einsum("bnp,bn->p", scaled, Y))
        importance = 1 / ((Y - X @ change).square().mean(dim=1) + 1e-8).sqrt()
    return (start + change).tolist()


def fit_plan(
    draw: Draw, reference: Reference, num_steps: int, guidance: tuple[float, float, float]
) -> tuple[SolverPlan, Tensor]:
    """A plan of so many steps, at least 2, and what it draws.

    Args:
        draw: (scheduler, number of steps) -> latents (B, C, h, w), always from the same noise, as for the reference.
    """
    goals = [*reference.at(num_steps)[1:], reference.x_0]
    fitter = Fitter(second_order(karras_grid(num_steps)), goals)
    drawn = draw(fitter, num_steps)
    return replace(fitter.plan, guidance=guidance), drawn


def relative_error(latents: Tensor, reference: Tensor) -> float:
    """Root mean square distance, relative to the reference's own size."""
    return ((latents - reference).square().mean() / reference.square().mean()).sqrt().item()


def read_plans(pipeline: Path) -> list[SolverPlan]:
    """Those stored with a pipeline. Raises UserError where the file cannot be read."""
    path = pipeline / FITTED_FILE
    if not path.is_file():
        return []
    try:
        return [parse_plan(stored) for stored in json.loads(path.read_text(encoding="utf-8"))["plans"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and fit again with --fit_schedule") from None


def parse_plan(stored: dict[str, Any]) -> SolverPlan:
    """Raises KeyError, TypeError or ValueError where it is none."""
    log_snrs = tuple(map(float, stored["log_snrs"]))
    weights = tuple(tuple(map(float, row)) for row in stored["weights"])
    if len(weights) != len(log_snrs) or not all(map(math.isfinite, [*log_snrs, *itertools.chain(*weights)])):
        raise ValueError("a plan needs a row of finite weights for each step")
    scale, lowest, highest = map(float, stored["guidance"])
    return SolverPlan(log_snrs, weights, (scale, lowest, highest))


def store_plan(pipeline: Path, plan: SolverPlan) -> Path:
    """Add a plan to those of a pipeline, instead of that for as many steps and the same guidance. -> the file"""
    others = [
        other
        for other in read_plans(pipeline)
        if (len(other.log_snrs), other.guidance) != (len(plan.log_snrs), plan.guidance)
    ]
    path = pipeline / FITTED_FILE
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"plans": [asdict(each) for each in [*others, plan]]}, indent=1)
    return path
