import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sample.parts import NAMES, PREDICTIONS, gaussian_flow, gaussian_predictor
from uvit.conventions import PredictionType
from uvit.errors import UserError
from uvit.sample.denoise import denoise, exact_timesteps
from uvit.sample.schedulers import build_scheduler

SHAPE = (3, 4, 8, 8)
CONTEXT = torch.zeros(3, 5, 6)
MEAN = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def draw(scheduler, predictor, prediction_type, steps=20, guidance_scale=1.0, **options) -> Tensor:  # type: ignore[no-untyped-def]
    seeded = torch.Generator().manual_seed(3)
    options = {"generator": seeded} | options
    return denoise(predictor, scheduler, NOISE, CONTEXT, CONTEXT[:1], guidance_scale, steps, prediction_type, **options)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_perfect_predictor_samples_x_0_back(name: str, prediction_type: PredictionType) -> None:
    for steps in (1, 2, 20):
        x_0 = draw(build_scheduler(name), gaussian_predictor(MEAN, 0, prediction_type), prediction_type, steps)
        assert (x_0 - MEAN).abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_equivalent_networks_draw_the_same_whatever_the_scheduler_asks_for(name: str) -> None:
    drawn = [
        draw(build_scheduler(name, asked), gaussian_predictor(MEAN, 0.5, predicted), predicted)
        for predicted in PREDICTIONS
        for asked in PREDICTIONS
    ]
    assert all((x - drawn[0]).abs().max() < 1e-4 for x in drawn)
    assert (drawn[0] - MEAN).abs().max() > 0.5


# First-order solvers err by 1/steps; Euler and Heun begin with 0.23% too little noise; all end with one plain
# step from the least noise of training, for 0.0008.
@pytest.mark.parametrize(
    ("name", "steps", "rms"),
    [
        ("ddim", 1000, 0.003),
        ("euler", 1000, 0.004),
        ("heun", 100, 0.0025),
        ("dpmsolver++", 50, 0.001),
        ("unipc", 50, 0.001),
    ],
)
def test_converges_to_the_exact_flow(name: str, steps: int, rms: float) -> None:
    x_0 = draw(build_scheduler(name), gaussian_predictor(MEAN, 0.5, "epsilon"), "epsilon", steps)
    assert (x_0 - gaussian_flow(NOISE, MEAN, 0.5)).square().mean().sqrt() < rms


def test_ddpm_draws_from_the_data() -> None:
    many = torch.randn(64, *SHAPE[1:], generator=torch.Generator().manual_seed(4))
    context = torch.zeros(64, 5, 6)
    predictor = gaussian_predictor(MEAN, 0.5, "epsilon")
    generator = torch.Generator().manual_seed(5)
    x_0 = denoise(predictor, build_scheduler("ddpm"), many, context, context, 1, 1000, "epsilon", generator)
    assert (x_0 - MEAN).mean() == pytest.approx(0, abs=0.02)
    assert (x_0 - MEAN).std() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_those_of_training(name: str) -> None:
    seen: list[float] = []

    def predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        assert timesteps.shape == (3,)
        seen.append(timesteps[0].item())
        return x_n

    draw(build_scheduler(name), predictor, "epsilon", 20)
    assert seen[0] == 1000
    assert min(seen) >= 1
    assert seen == sorted(seen, reverse=True)
    if name in ("ddim", "ddpm"):
        assert seen == list(range(1000, 0, -50))


def test_whole_timesteps_between_which_the_noise_level_lies_get_its_own_label() -> None:
    karras = build_scheduler("dpmsolver++")
    karras.set_timesteps(25)
    labels = exact_timesteps(karras)
    assert ((labels - 1 - karras.timesteps).abs() <= 0.501).all()
    assert ((labels - 1 - karras.timesteps).abs() > 0.1).any()

    even = type(karras).from_config(karras.config, use_karras_sigmas=False)
    even.set_timesteps(25)
    assert torch.equal(exact_timesteps(even), even.timesteps.float() + 1)


def test_a_grid_finer_than_whole_timesteps_loses_no_step() -> None:
    x_0 = draw(build_scheduler("dpmsolver++"), gaussian_predictor(MEAN, 0.5, "sample"), "sample", 1000)
    assert (x_0 - gaussian_flow(NOISE, MEAN, 0.5)).square().mean().sqrt() < 0.002


def test_number_of_steps_that_the_scheduler_cannot_divide_is_refused() -> None:
    with pytest.raises(UserError, match="--num_inference_steps 61"):
        draw(build_scheduler("ddim"), gaussian_predictor(MEAN, 0, "epsilon"), "epsilon", 61)


def context_predictor(calls: list[int]):  # type: ignore[no-untyped-def]
    """x_0 is what the context's first entry says."""

    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        calls.append(len(x_n))
        return context[:, 0, 0].view(-1, 1, 1, 1).expand_as(x_n)

    return predict


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_guidance(guidance_scale: float) -> None:
    context, empty = torch.full((3, 5, 6), 0.8), torch.full((5, 6), 0.3)
    calls: list[int] = []
    x_0 = denoise(context_predictor(calls), build_scheduler(), NOISE, context, empty, guidance_scale, 10, "sample")
    assert x_0.numpy() == pytest.approx(0.3 + guidance_scale * 0.5, abs=1e-4)
    assert set(calls) == {3 if guidance_scale == 1 else 6}


def test_guidance_interval() -> None:
    """Where there is no guidance the network is asked once, and for the prompt."""
    calls: list[int] = []
    context, empty = torch.full((3, 5, 6), 0.8), torch.full((5, 6), 0.3)
    drawn = [
        denoise(
            context_predictor(calls), build_scheduler("ddim"), NOISE, context, empty, 2, 10, "sample",
            guidance_interval=interval,
        )
        for interval in ((401.0, 1000.0), (1.0, 600.0))
    ]  # fmt: skip
    assert calls == [6] * 6 + [3] * 4 + [3] * 4 + [6] * 6  # labels 1000, 900, ..., 100
    assert drawn[0].numpy() == pytest.approx(0.8, abs=1e-4)  # the last step alone decides here
    assert drawn[1].numpy() == pytest.approx(1.3, abs=1e-4)


def test_each_image_has_its_own_empty_context() -> None:
    empty = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1).expand(3, 5, 6)
    context = torch.full((3, 5, 6), 0.5)
    x_0 = denoise(context_predictor([]), build_scheduler(), NOISE, context, empty, 2, 10, "sample")
    assert x_0[:, 0, 0, 0].numpy() == pytest.approx(np.array([1.0, 0.9, 0.8]), abs=1e-4)


def test_ddpm_noise_is_the_generators_alone() -> None:
    def run(seed: int) -> Tensor:
        torch.randn(seed)  # whatever else draws from torch's own generator
        generator = torch.Generator().manual_seed(seed)
        predictor = gaussian_predictor(MEAN, 0.5, "epsilon")
        return draw(build_scheduler("ddpm"), predictor, "epsilon", generator=generator)

    assert torch.equal(run(7), run(7))
    assert not torch.allclose(run(7), run(8), atol=0.1)


def test_on_step_sees_each_step_and_may_change_the_latents() -> None:
    steps = []

    def on_step(i: int, t: Tensor, latents: Tensor) -> Tensor:
        steps.append((i, int(t)))
        return latents * 0 + 9 if i == 4 else latents

    predictor = gaussian_predictor(MEAN, 0, "epsilon")
    x = draw(build_scheduler("ddim"), predictor, "epsilon", 5, on_step=on_step, progress=lambda ts: list(ts))
    assert steps == [(0, 999), (1, 799), (2, 599), (3, 399), (4, 199)]
    assert (x == 9).all()


def test_network_computes_in_the_dtype_of_the_context() -> None:
    dtypes = set()

    def predictor(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        dtypes.add((x_n.dtype, timesteps.dtype, context.dtype))
        return x_n * 0

    context = CONTEXT.bfloat16()
    x_0 = denoise(predictor, build_scheduler(), NOISE, context, context, 2, 3, "epsilon")
    assert dtypes == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    assert x_0.dtype == torch.float32
