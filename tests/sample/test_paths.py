"""Every path with every solver: what it begins with, what the network gets, and where it ends."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tests.sample.parts import (
    gaussian_flow,
    gaussian_predictor,
    linear_mixture_flow,
    linear_mixture_predictor,
    mixture_x_0,
    tiny_pipeline_folder,
)
from uvit.conventions import PREDICTION_TYPES, Conventions, DiffusionPath, PredictionType
from uvit.diffusion import log_snr, scheduler_config, signal_and_noise
from uvit.errors import UserError
from uvit.sample.denoise import at_step, denoise, exact_timesteps
from uvit.sample.edit import first_step
from uvit.sample.fit import fit_plan, parse_plan, read_plans, relative_error, solve, store_plan
from uvit.sample.load import open_pipeline
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import (
    MultistepScheduler,
    SolverPlan,
    build_scheduler,
    check_scheduler,
    second_order,
    set_timesteps,
    solver_grid,
)

SOLVERS: dict[DiffusionPath, tuple[str, ...]] = {
    "linear": ("dpmsolver++", "unipc", "euler", "heun"),
    "vp_zero_snr": ("dpmsolver++", "unipc", "euler", "ddim", "ddpm"),
}
CASES = [(path, name) for path, names in SOLVERS.items() for name in names]
PREDICTED = [(*case, kind) for case in CASES for kind in PREDICTION_TYPES[case[0]]]
SHAPE = (2, 4, 4, 4)
CONTEXT = torch.zeros(2, 5, 6)
MEAN = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def draw(
    scheduler: Any, predictor: Any, kind: PredictionType, steps: int, path: DiffusionPath, **options: Any
) -> Tensor:
    options = {"generator": torch.Generator().manual_seed(3)} | options
    return denoise(predictor, scheduler, NOISE, CONTEXT, CONTEXT[:1], 1, steps, kind, path=path, **options)


# From noise to x_0


@pytest.mark.parametrize(("path", "name", "kind"), PREDICTED)
def test_perfect_predictor_samples_x_0_back(path: DiffusionPath, name: str, kind: PredictionType) -> None:
    """From pure noise, in one step too: nothing is infinite or NaN there.

    Zero SNR is 0 in DDIM and DDPM and 2^-24 elsewhere, so their first x_0 differs by 2^-12 of the noise. Euler's
    latents there are 2^12 times the noise, and are rounded to 2^-11.
    """
    for steps in (1, 2, 20):
        predictor = gaussian_predictor(MEAN, 0, kind, path)
        x_0 = draw(build_scheduler(name, path=path), predictor, kind, steps, path)
        assert (x_0 - MEAN).abs().max() < (1e-3 if name in ("ddim", "ddpm", "euler") else 1e-4)


@pytest.mark.parametrize(("path", "name"), CASES)
def test_the_network_gets_the_noise_that_its_timestep_says(path: DiffusionPath, name: str) -> None:
    """Where the data is one point, the noise in every x_n is the noise that sampling began with."""
    seen: list[float] = []

    def predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append(timesteps[0].item())
        a, s = signal_and_noise(timesteps, x_n, path)
        if name != "ddpm":  # which adds its own
            assert (x_n - a * IMAGE - s * NOISE).abs().max() < 1e-3
        return IMAGE

    draw(build_scheduler(name, path=path), predictor, "sample", 20, path)
    assert seen[0] == pytest.approx(1000, abs=2e-3)  # UniPC begins a millionth below
    assert min(seen) > 0 and seen == sorted(seen, reverse=True)
    if (path, name) in (("linear", "dpmsolver++"), ("linear", "euler")):
        assert seen == pytest.approx(np.linspace(1000, 50, 20).tolist())


@pytest.mark.parametrize(("path", "name"), CASES)
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_begins_with_a_picture_at_the_noise_of_its_step(path: DiffusionPath, name: str, strength: float) -> None:
    scheduler, distances = build_scheduler(name, path=path), []
    start = first_step(strength, 20, scheduler.order)

    def on_step(i: int, t: Tensor, latents: Tensor) -> Tensor:
        distances.append((latents - at_step(scheduler, i + 1, IMAGE, NOISE, path)).abs().max().item())
        return latents

    options = {"start": start, "image": IMAGE, "on_step": on_step}
    x_0 = draw(scheduler, gaussian_predictor(IMAGE, 0, "sample", path), "sample", 20, path, **options)
    assert len(distances) == len(scheduler.timesteps) - start
    assert (x_0 - IMAGE).abs().max() < 1e-4
    if name != "ddpm":
        assert max(distances) < 1e-3


def test_ddpm_draws_from_the_data_from_pure_noise() -> None:
    many, context = torch.randn(64, *SHAPE[1:], generator=torch.Generator().manual_seed(4)), torch.zeros(64, 5, 6)
    predictor = gaussian_predictor(MEAN, 0.5, "v_prediction", "vp_zero_snr")
    ddpm, generator = build_scheduler("ddpm", path="vp_zero_snr"), torch.Generator().manual_seed(5)
    x_0 = denoise(predictor, ddpm, many, context, context, 1, 500, "v_prediction", generator, path="vp_zero_snr")
    assert (x_0 - MEAN).mean() == pytest.approx(0, abs=0.03)
    assert (x_0 - MEAN).std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("path", "name", "steps", "rms"),
    [
        ("linear", "dpmsolver++", 50, 0.003),
        ("linear", "unipc", 50, 0.003),
        ("linear", "heun", 50, 0.001),
        ("linear", "euler", 500, 0.003),
        ("vp_zero_snr", "dpmsolver++", 50, 0.003),
        ("vp_zero_snr", "ddim", 500, 0.005),
    ],
)
def test_converges_to_the_exact_flow(path: DiffusionPath, name: str, steps: int, rms: float) -> None:
    predictor = gaussian_predictor(MEAN, 0.5, "sample", path)
    x_0 = draw(build_scheduler(name, path=path), predictor, "sample", steps, path)
    assert (x_0 - gaussian_flow(NOISE, MEAN, 0.5, path)).square().mean().sqrt() < rms


# A multistep solver is of first order in its last step, from the least noise to x_0; the order shows before that.
@pytest.mark.parametrize(
    ("name", "steps", "order"),
    [("euler", (20, 40, 80), 1), ("heun", (20, 40), 2), ("dpmsolver++", (40, 80, 160), 2), ("unipc", (40, 80, 160), 2)],
)
def test_converges_at_its_order_on_a_linear_path(name: str, steps: tuple[int, ...], order: int) -> None:
    start = torch.linspace(-2.5, 2.5, 32).view(1, 1, 4, 8)
    context, errors = torch.zeros(1, 1, 1), []
    for num_steps in steps:
        scheduler, states = build_scheduler(name, path="linear"), []

        def on_step(i: int, t: Tensor, latents: Tensor, states: list[Tensor] = states) -> Tensor:
            states.append(latents)
            return latents

        options: Any = {"path": "linear", "on_step": on_step}
        denoise(linear_mixture_predictor, scheduler, start, context, context, 1, num_steps, "sample", **options)
        i = len(scheduler.timesteps) * 4 // 5
        i += (i + 1) % scheduler.order  # between the two evaluations of a step of Heun's the latents are not yet there
        timestep = exact_timesteps(scheduler, "linear")[i].item()
        errors.append((states[i - 1] - linear_mixture_flow(start, timestep)).square().mean().sqrt().item())
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < np.log2(coarse / fine) < order + 1.1, errors


def test_guidance_covers_timesteps_below_one_unless_an_interval_says_otherwise() -> None:
    guided: list[int] = []

    def predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        guided.append(len(x_n) // 2)
        return x_n

    scheduler = build_scheduler("dpmsolver++", path="linear", shift=0.01)
    denoise(predictor, scheduler, NOISE, CONTEXT, CONTEXT, 3, 20, "sample", path="linear")
    assert exact_timesteps(scheduler, "linear").min() < 1
    assert guided == [2] * 20


@pytest.mark.parametrize(("name", "shift"), [("euler", 0.2), ("euler", 1.32), ("heun", 0.15), ("heun", 8.39)])
def test_the_first_step_has_guidance_whatever_rounding_does_to_its_timestep(name: str, shift: float) -> None:
    scheduler, guided = build_scheduler(name, path="linear", shift=shift), list[int]()

    def predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        guided.append(len(x_n) // 2)
        return x_n

    denoise(predictor, scheduler, NOISE, CONTEXT, CONTEXT, 3, 2, "sample", path="linear")
    assert exact_timesteps(scheduler, "linear").max() <= 1000
    assert set(guided) == {2}


# What a path can be sampled with


@pytest.mark.parametrize(("path", "name"), [("linear", "ddim"), ("linear", "official"), ("vp_zero_snr", "heun")])
def test_a_solver_that_cannot_is_named_with_those_that_can(path: DiffusionPath, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"--scheduler {name}: cannot sample a model of path {path}; use dpmsolver\+\+"
    ):
        build_scheduler(name, path=path)


@pytest.mark.parametrize("name", ["unipc", "ddim", "ddpm"])
def test_steps_that_a_solver_cannot_space_are_named(name: str) -> None:
    set_timesteps(build_scheduler(name, path="vp_zero_snr"), 60)
    with pytest.raises(UserError, match=r"--num_inference_steps 61: .* choose a number that divides 1000"):
        set_timesteps(build_scheduler(name, path="vp_zero_snr"), 61)


@pytest.mark.parametrize(
    ("path", "scheduler", "message"),
    [
        ("linear", DDIMScheduler(**scheduler_config()), "FlowMatchEulerDiscreteScheduler"),
        ("linear", EulerDiscreteScheduler.from_config(build_scheduler(path="linear").config), "use FlowMatch"),
        ("linear", DPMSolverMultistepScheduler(**scheduler_config()), "use_flow_sigmas=True"),
        ("linear", DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction_type='flow_prediction'"),
        (
            "linear",
            UniPCMultistepScheduler(**scheduler_config(path="linear"), use_karras_sigmas=True),
            "use_karras_sigmas=False",
        ),
        ("linear", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=False"),
        ("vp", FlowMatchEulerDiscreteScheduler(), "another noise schedule"),
        ("vp", build_scheduler(path="linear"), "use_flow_sigmas=False"),
        ("vp", build_scheduler(path="vp_zero_snr"), "another noise schedule"),
        ("vp_zero_snr", build_scheduler(), "another noise schedule"),
        ("vp_zero_snr", build_scheduler("ddim", "epsilon", "vp_zero_snr"), "prediction_type='v_prediction'"),
        ("vp", MultistepScheduler(path="linear"), "use_flow_sigmas=False"),
        ("linear", MultistepScheduler(), "path linear"),
    ],
)
def test_one_that_does_not_fit_is_refused(path: DiffusionPath, scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler, path)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler.from_config(build_scheduler(path="linear").config),
        UniPCMultistepScheduler.from_config(build_scheduler(path="linear").config),
        FlowMatchEulerDiscreteScheduler(shift=3),
    ],
)
def test_those_of_diffusers_sample_a_linear_path(scheduler: Any) -> None:
    predictor = gaussian_predictor(MEAN, 0.5, "flow_prediction", "linear")
    x_0 = draw(scheduler, predictor, "flow_prediction", 100, "linear")
    # Those of first order, and DPM-Solver++ that begins at 0.999, err by about 1/steps.
    assert (x_0 - gaussian_flow(NOISE, MEAN, 0.5, "linear")).square().mean().sqrt() < 0.02


def test_a_shift_moves_the_steps_of_all_solvers_alike() -> None:
    even = np.linspace(1, 0.1, 10)
    moved = 1000 * 3 * even / (1 + 2 * even)
    for name in ("dpmsolver++", "euler"):
        scheduler = build_scheduler(name, path="linear", shift=3.0)
        set_timesteps(scheduler, 10)
        assert exact_timesteps(scheduler, "linear").tolist() == pytest.approx(moved.tolist())


# Fitted solvers


@pytest.mark.parametrize("path", ["linear", "vp_zero_snr"])
def test_solvers_are_fitted_to_a_path_and_stored_with_it(path: DiffusionPath, tmp_path: Path) -> None:
    def predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        if path == "linear":
            return linear_mixture_predictor(x_n, timesteps, context)
        return torch.from_numpy(mixture_x_0(x_n.double().numpy(), log_snr(timesteps, path).view(-1, 1, 1, 1).numpy()))

    def sample_latents(scheduler: MultistepScheduler, num_steps: int) -> Tensor:
        return denoise(predictor, scheduler, NOISE, CONTEXT, CONTEXT, 1, num_steps, "sample", path=path)

    reference = solve(sample_latents, path)
    between = reference.at(300)
    assert all(torch.equal(between[i], reference.latents[i].double()) for i in (0, 1, 100, 299))
    plan, drawn = fit_plan(sample_latents, reference, 6, (1.0, 1.0, 1000.0))
    plain = sample_latents(MultistepScheduler([second_order(solver_grid(6, path), path)], path), 6)
    assert relative_error(drawn, reference.x_0) < 0.6 * relative_error(plain, reference.x_0)

    store_plan(tmp_path, plan)
    (stored,) = read_plans(tmp_path)
    assert stored == plan and stored.path == path
    assert torch.equal(sample_latents(MultistepScheduler([stored], path), 6), drawn)
    with pytest.raises(UserError, match="no solver of 6 steps"):
        MultistepScheduler([stored]).set_timesteps(6)


def test_a_stored_solver_without_a_path_is_of_vp() -> None:
    plan = {"log_snrs": [-1.0], "weights": [[0.0, 1.0]], "guidance": [2.0, 1.0, 1000.0]}
    assert parse_plan(plan) == SolverPlan((-1.0,), ((0.0, 1.0),), (2.0, 1.0, 1000.0), "vp")
    with pytest.raises(ValueError, match="path 'flow' is none of"):
        parse_plan(plan | {"path": "flow"})


# What a model records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "flow"}, "path 'flow' is none of 'vp', 'linear', 'vp_zero_snr'"),
        ({"path": "linear"}, "prediction_type 'epsilon' does not determine x_0"),
        ({"path": "linear", "prediction_type": "sample", "timestep_labels": "0..999"}, "timestep_labels '0..999'"),
    ],
)
def test_conventions_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conventions(**settings)


@pytest.mark.parametrize("path", ["linear", "vp_zero_snr"])
def test_a_pipeline_folder_keeps_its_path(path: DiffusionPath, tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sample", diffusion_path=path)
    options: Any = {"num_inference_steps": 5, "output_type": "latent"}
    own = UViTPipeline.from_pretrained(folder)
    assert (own.conventions.path, own.unet.config.path) == (path, path)
    wanted = own("two cats", generator=torch.Generator().manual_seed(0), **options).images
    named = open_pipeline(str(folder), "cpu")
    assert torch.equal(named("two cats", generator=torch.Generator().manual_seed(0), **options).images, wanted)
    assert torch.isfinite(wanted).all()
    with pytest.raises(UserError, match="--scheduler official: cannot sample"):
        open_pipeline(str(folder), "cpu", scheduler="official")
