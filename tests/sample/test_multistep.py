import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from tests.sample.parts import gaussian_flow, gaussian_predictor, mixture_predictor
from uvit.diffusion import log_snr
from uvit.errors import UserError
from uvit.sample.denoise import denoise
from uvit.sample.schedulers import (
    MultistepScheduler,
    SolverPlan,
    build_scheduler,
    check_scheduler,
    karras_grid,
    second_order,
)

NOISE = torch.linspace(-2.5, 2.5, 32).view(1, 1, 4, 8)
CONTEXT = torch.zeros(1, 1, 1)


def draw(scheduler, num_steps: int, guidance_scale: float = 1, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return denoise(
        mixture_predictor, scheduler, NOISE, CONTEXT, CONTEXT, guidance_scale, num_steps, "epsilon", **options
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 25])
def test_second_order_on_karras_grid_is_dpm_solver(num_steps: int) -> None:
    scheduler = MultistepScheduler([second_order(karras_grid(num_steps))])
    diffusers = DPMSolverMultistepScheduler.from_config(build_scheduler("dpmsolver++").config)
    assert (draw(scheduler, num_steps) - draw(diffusers, num_steps)).abs().max() < 1e-4


def test_karras_grid_runs_from_the_most_noise_to_the_least() -> None:
    grid = karras_grid(12)
    assert grid[[0, -1]].tolist() == pytest.approx(log_snr(torch.tensor([1000, 1])).tolist())
    roots = torch.exp(-grid / 2 / 7)
    assert roots.diff().numpy() == pytest.approx(roots.diff()[0].item())


def test_any_grid_will_do() -> None:
    mean = torch.linspace(-1, 1, 32).view(1, 4, 8)
    even = torch.linspace(*log_snr(torch.tensor([1000, 1])).tolist(), 40, dtype=torch.float64)
    predict = gaussian_predictor(mean, 0.5, "v_prediction")
    x_0 = denoise(predict, MultistepScheduler([second_order(even)]), NOISE, CONTEXT, CONTEXT, 1, 40, "v_prediction")
    assert (x_0 - gaussian_flow(NOISE, mean, 0.5)).square().mean().sqrt() < 0.002


def test_the_plan_is_that_of_the_steps_and_the_guidance() -> None:
    three, two = second_order(karras_grid(3)), second_order(karras_grid(2))
    plans = [
        SolverPlan(plain.log_snrs, plain.weights, (scale, 1, 1000))
        for plain, scale in ((three, 2.0), (three, 4.0), (two, 2.0))
    ]
    scheduler = MultistepScheduler(plans)
    for i, (num_steps, guidance_scale) in enumerate([(3, 2), (3, 4), (2, 2)]):
        draw(scheduler, num_steps, guidance_scale)
        assert scheduler.plan is plans[i]
    with pytest.raises(UserError, match=r"no solver of 2 steps .* guidance 4 .*3 for guidance 2; .*--fit_schedule"):
        draw(scheduler, 2, 4)
    with pytest.raises(UserError, match="for guidance 2 at 100 to 1000"):
        draw(scheduler, 2, 2, guidance_interval=(100, 1000))


def test_it_begins_with_noise_alone() -> None:
    scheduler = MultistepScheduler([second_order(karras_grid(5))])
    with pytest.raises(UserError, match="pure noise"):
        draw(scheduler, 5, start=2, image=NOISE)


def test_it_is_a_scheduler_as_others_are() -> None:
    scheduler = MultistepScheduler()
    check_scheduler(scheduler)
    swapped = DDIMScheduler.from_config(scheduler.config)
    check_scheduler(swapped)
    assert swapped.config.prediction_type == "sample"
