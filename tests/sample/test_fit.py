import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.sample.parts import mixture_flow, mixture_predictor
from uvit.errors import UserError
from uvit.sample.denoise import denoise
from uvit.sample.fit import (
    FITTED_FILE,
    SampleLatents,
    fit_plan,
    least_squares,
    read_plans,
    relative_error,
    solve,
    store_plan,
)
from uvit.sample.schedulers import MultistepScheduler, SolverPlan, karras_grid, second_order

NONE = (1.0, 1.0, 1000.0)  # guidance


def drawing(seed: int, calls: list[int] | None = None) -> SampleLatents:
    """Draws always from that noise, for data of a mixture of normal distributions."""
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    context = torch.zeros(4, 1, 1)

    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(x_n))
        return mixture_predictor(x_n, timesteps, context)

    return lambda scheduler, n: denoise(predict, scheduler, noise, context, context, 1, n, "epsilon")


def test_reference_follows_the_exact_flow() -> None:
    reference = solve(drawing(0))
    start = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double().numpy()
    x_1, x_0 = mixture_flow(start)
    assert abs(reference.x_0.numpy() - x_0).max() < 1e-3
    for num_steps in (2, 7, 12):
        between = reference.at(num_steps)
        assert len(between) == num_steps
        assert abs(between[0].numpy() - start).max() < 1e-6
        assert abs(between[-1].numpy() - x_1).max() < 1e-3
    # A level of both grids, and one of neither, from twice as many steps.
    assert torch.equal(reference.at(300)[100], reference.latents[100].double())
    assert torch.allclose(reference.at(24)[10], reference.at(47)[20], atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 5, 8])
def test_fitted_steps_are_closer_on_other_noise_too(num_steps: int) -> None:
    reference, other = solve(drawing(0)), solve(drawing(1))
    plan, drawn = fit_plan(drawing(0), reference, num_steps, NONE)
    plain = MultistepScheduler([second_order(karras_grid(num_steps))])
    assert torch.allclose(drawing(0)(MultistepScheduler([plan]), num_steps), drawn, atol=1e-5)
    for draw, goal in ((drawing(0), reference), (drawing(1), other)):
        fitted = relative_error(draw(MultistepScheduler([plan]), num_steps), goal.x_0)
        assert fitted < 0.6 * relative_error(draw(plain, num_steps), goal.x_0)


def test_fitting_asks_the_network_no_more_often_than_drawing() -> None:
    calls: list[int] = []
    reference = solve(drawing(0))
    fit_plan(drawing(0, calls), reference, 6, NONE)
    assert calls == [4] * 6


def test_least_squares_finds_the_weights_and_lets_the_odd_picture_go() -> None:
    terms = [torch.randn(9, 50, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    goal = 0.5 * terms[0] - 2 * terms[1] + 0.1 * terms[2]
    assert least_squares(terms, goal, [0, 1, 0]) == pytest.approx([0.5, -2, 0.1], abs=1e-4)
    goal[0] += 10
    assert least_squares(terms, goal, [0, 1, 0]) == pytest.approx([0.5, -2, 0.1], abs=0.05)


def test_terms_that_are_alike_keep_to_the_prior() -> None:
    term = torch.ones(2, 5)
    assert least_squares([term, term], term, [0.25, 0.75]) == pytest.approx([0.25, 0.75], abs=1e-6)


def plan(num_steps: int, guidance_scale: float) -> SolverPlan:
    plain = second_order(karras_grid(num_steps))
    return SolverPlan(plain.log_snrs, plain.weights, (guidance_scale, 1, 1000))


def test_plans_are_stored_with_the_pipeline(tmp_path: Path) -> None:
    assert read_plans(tmp_path) == []
    for each in (plan(4, 2.0), plan(4, 7.5), plan(6, 2.0)):
        assert store_plan(tmp_path, each) == tmp_path / FITTED_FILE
    again = SolverPlan(plan(4, 2.0).log_snrs, ((1.0, 0.0),) * 4, (2.0, 1, 1000))
    store_plan(tmp_path, again)
    assert read_plans(tmp_path) == [plan(4, 7.5), plan(6, 2.0), again]
    assert [path.name for path in (tmp_path / "scheduler").iterdir()] == ["fitted.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"plans": [{"log_snrs": [1]}]}',
        '{"plans": [{"log_snrs": ["a"]}]}',
        '{"plans": [{"log_snrs": [1, 2], "weights": [[0, 1]], "guidance": [2, 1, 1000]}]}',
        '{"plans": [{"log_snrs": [1], "weights": [[0, NaN]], "guidance": [2, 1, 1000]}]}',
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / FITTED_FILE).write_text(text)
    with pytest.raises(UserError, match=r"fitted\.json: cannot be read"):
        read_plans(tmp_path)


def test_what_is_stored_can_be_read_by_people(tmp_path: Path) -> None:
    store_plan(tmp_path, plan(3, 2.0))
    (stored,) = json.loads((tmp_path / FITTED_FILE).read_text())["plans"]
    assert stored["guidance"] == [2, 1, 1000]
    assert len(stored["log_snrs"]) == len(stored["weights"]) == 3
