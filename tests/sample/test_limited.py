"""Where guidance makes the flow stiff it stays on it longer than DPM-Solver++ does; elsewhere the two draw the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from uvit.diffusion import signal_and_noise
from uvit.sample.denoise import denoise
from uvit.sample.limited import LimitedDPMSolverScheduler
from uvit.sample.schedulers import build_scheduler

NOISE = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPT, EMPTY = torch.ones(4, 1, 1), torch.zeros(1, 1, 1)


def predictor(std: float) -> Callable[..., Tensor]:
    """x_0 as a perfect network predicts it: with the prompt normal around 1 with `std`, without it around 0 with 1.

    A narrow one guided away from a wide one overshoots what there is of it in x_n: the more, the larger the guidance.
    """

    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a, s = signal_and_noise(timesteps, x_n.double())
        asked = context[:, :1, :1, None]
        stds = torch.where(asked > 0, std, 1.0)
        return (asked + a * stds**2 / (a**2 * stds**2 + s**2) * (x_n - a * asked)).float()

    return predict


def draw(scheduler: Any, std: float, guidance_scale: float, num_steps: int, noise: Tensor = NOISE) -> Tensor:
    prompt = PROMPT[: len(noise)]
    return denoise(predictor(std), scheduler, noise, prompt, EMPTY, guidance_scale, num_steps, "sample")


def error(scheduler: Any, *asked: float) -> float:
    """Root mean square distance to where the flow ends."""
    end = draw(build_scheduler("ddim"), *asked[:2], 1000)
    return (draw(scheduler, *asked) - end).square().mean().sqrt().item()


@pytest.fixture
def limited() -> LimitedDPMSolverScheduler:
    scheduler = build_scheduler("dpmsolver++")
    assert isinstance(scheduler, LimitedDPMSolverScheduler)
    return scheduler


@pytest.fixture
def plain(limited: LimitedDPMSolverScheduler) -> Any:
    return DPMSolverMultistepScheduler.from_config(limited.config)


def test_stays_on_a_stiff_flow(limited: LimitedDPMSolverScheduler, plain: Any) -> None:
    assert error(plain, 0.05, 7.5, 20) > 1
    assert error(limited, 0.05, 7.5, 20) < 0.06
    for num_steps in (8, 12, 30):
        assert error(limited, 0.05, 7.5, num_steps) < 0.3 * error(plain, 0.05, 7.5, num_steps)


@pytest.mark.parametrize(("guidance_scale", "num_steps"), [(1, 12), (2, 12), (2, 50), (4, 20)])
def test_draws_the_same_on_a_smooth_flow(
    limited: LimitedDPMSolverScheduler, plain: Any, guidance_scale: float, num_steps: int
) -> None:
    ours, theirs = (draw(scheduler, 0.3, guidance_scale, num_steps) for scheduler in (limited, plain))
    # Apart by what the second step, here of first order, does at the noise of the start.
    assert (ours - theirs).abs().max() < 0.02 * error(plain, 0.3, guidance_scale, num_steps)


def test_each_picture_has_its_own_share_and_each_drawing_begins_anew(limited: LimitedDPMSolverScheduler) -> None:
    together = draw(limited, 0.05, 7.5, 12)
    assert torch.equal(draw(limited, 0.05, 7.5, 12), together)
    alone = torch.cat([draw(limited, 0.05, 7.5, 12, picture[None]) for picture in NOISE])
    # What float32 rounds off grows on this flow.
    assert (alone - together).abs().max() < 1e-4 * together.abs().max()
