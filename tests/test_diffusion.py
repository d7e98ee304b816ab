"""Properties of the diffusion process, and its constants against arrays of another implementation."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit import diffusion
from uvit.conventions import LatentSpace, PredictionType
from uvit.diffusion import NUM_TIMESTEPS

KINDS = get_args(PredictionType)
labels = st.lists(st.integers(1, NUM_TIMESTEPS), min_size=3, max_size=3).map(torch.tensor)
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=50, deadline=None)


def draws(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and noise, (3, 4, 2, 2) float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def fixture() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "fixtures" / "schedule_posterior_ema.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


# The schedule


def test_schedule_equals_the_fixture(fixture: dict[str, np.ndarray]) -> None:
    abar = diffusion.alphas_cumprod()
    assert abar.dtype == torch.float64
    np.testing.assert_allclose(abar.numpy(), fixture["cum_alphas"], rtol=1e-12)
    np.testing.assert_allclose(1 - abar[1:] / abar[:-1], fixture["betas"], rtol=1e-9)


def test_schedule_is_the_one_that_diffusers_is_told() -> None:
    scheduler = DDIMScheduler(**diffusion.scheduler_config())
    t = torch.arange(NUM_TIMESTEPS)
    label = diffusion.from_scheduler_timestep(t)
    assert (label.min(), label.max()) == (1, NUM_TIMESTEPS)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), diffusion.alphas_cumprod()[label], rtol=1e-4, atol=0)


@few
@given(n=st.floats(1, NUM_TIMESTEPS))
def test_timestep_to_snr_and_back(n: float) -> None:
    timestep = torch.tensor([n], dtype=torch.float64)
    assert diffusion.timestep_of_log_snr(diffusion.log_snr(timestep)).item() == pytest.approx(n, abs=1e-6)


def test_log_snr_falls_and_ends_are_held() -> None:
    values = diffusion.log_snr(torch.arange(1, NUM_TIMESTEPS + 1))
    assert (values.diff() < 0).all()
    abar = diffusion.alphas_cumprod()
    torch.testing.assert_close(values.exp(), abar[1:] / (1 - abar[1:]))
    assert diffusion.timestep_of_log_snr(torch.tensor([100.0, -100.0])).tolist() == [1, NUM_TIMESTEPS]


@few
@given(timesteps=labels)
def test_variance_is_preserved(timesteps: torch.Tensor) -> None:
    a, s = diffusion.signal_and_noise(timesteps, torch.zeros(3, 4, 2, 2, dtype=torch.float64))
    assert a.shape == s.shape == (3, 1, 1, 1)
    torch.testing.assert_close(a**2 + s**2, torch.ones(3, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(a.flatten() ** 2, diffusion.alphas_cumprod()[timesteps])


# What the network predicts


@few
@given(timesteps=labels, kind=kinds, seed=seeds)
def test_target_recovers_x_0_and_noise(timesteps: torch.Tensor, kind: PredictionType, seed: int) -> None:
    x_0, noise = draws(seed)
    x_n = diffusion.add_noise(x_0, noise, timesteps)
    found = diffusion.split_prediction(diffusion.target(x_0, noise, timesteps, kind), x_n, timesteps, kind)
    torch.testing.assert_close(found, (x_0, noise), atol=1e-9, rtol=1e-9)


@few
@given(timesteps=labels, kind=kinds, other=kinds, seed=seeds)
def test_conversion_there_and_back(
    timesteps: torch.Tensor, kind: PredictionType, other: PredictionType, seed: int
) -> None:
    prediction, x_n = draws(seed)  # any prediction, not only a perfect one
    there = diffusion.convert_prediction(prediction, x_n, timesteps, kind, other)
    back = diffusion.convert_prediction(there, x_n, timesteps, other, kind)
    torch.testing.assert_close(back, prediction, atol=1e-9, rtol=1e-9)


@few
@given(timesteps=labels, kind=kinds, other=kinds, seed=seeds)
def test_conversion_turns_one_target_into_the_other(
    timesteps: torch.Tensor, kind: PredictionType, other: PredictionType, seed: int
) -> None:
    x_0, noise = draws(seed)
    converted = diffusion.convert_prediction(
        diffusion.target(x_0, noise, timesteps, kind),
        diffusion.add_noise(x_0, noise, timesteps),
        timesteps,
        kind,
        other,
    )
    torch.testing.assert_close(converted, diffusion.target(x_0, noise, timesteps, other), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_predictor_samples_x_0_back(kind: PredictionType) -> None:
    """Through a diffusers scheduler that is told our schedule and asks at our labels."""
    x_0, noise = draws(0)
    scheduler = DDIMScheduler(**diffusion.scheduler_config(kind), clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    x = diffusion.add_noise(x_0, noise, diffusion.from_scheduler_timestep(scheduler.timesteps[:1]))
    for t in scheduler.timesteps:
        n = diffusion.from_scheduler_timestep(t)[None]
        a, s = diffusion.signal_and_noise(n, x)
        x = scheduler.step(diffusion.target(x_0, (x - a * x_0) / s, n, kind), t, x).prev_sample
    torch.testing.assert_close(x, x_0, atol=1e-4, rtol=0)


# The loss


@few
@given(timesteps=labels, kind=kinds, gamma=st.floats(0.1, 20), seed=seeds)
def test_min_snr_loss_is_the_same_in_every_parametrisation(
    timesteps: torch.Tensor, kind: PredictionType, gamma: float, seed: int
) -> None:
    """A guess of x_0, expressed in any way, has one min-SNR loss: min(SNR, gamma) (x_0 - guess)^2."""
    x_0, noise = draws(seed)
    guess = x_0 + draws(seed + 1)[0]
    x_n = diffusion.add_noise(x_0, noise, timesteps)
    prediction = diffusion.convert_prediction(guess, x_n, timesteps, "sample", kind)
    loss = diffusion.loss(prediction, x_0, noise, timesteps, kind, snr_gamma=gamma)
    weight = diffusion.log_snr(timesteps).exp().clamp(max=gamma)
    torch.testing.assert_close(
        loss.double(), (weight * (guess - x_0).square().mean(dim=(1, 2, 3))).mean(), rtol=1e-3, atol=1e-6
    )


@few
@given(timesteps=labels, kind=kinds, seed=seeds)
def test_loss_is_zero_at_the_target_and_the_mean_square_beside_it(
    timesteps: torch.Tensor, kind: PredictionType, seed: int
) -> None:
    x_0, noise = (x.float() for x in draws(seed))
    target = diffusion.target(x_0, noise, timesteps, kind)
    for gamma in (None, 5.0):
        assert diffusion.loss(target, x_0, noise, timesteps, kind, gamma) == 0
    assert diffusion.loss(target + 2, x_0, noise, timesteps, kind).item() == pytest.approx(4, rel=1e-5)


def test_loss_of_half_precision_predictions_is_taken_in_float32() -> None:
    x_0, noise = (x.float() for x in draws(0))
    loss = diffusion.loss(torch.full_like(noise, 300).half(), x_0, noise, torch.tensor([1, 2, 3]))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss), "300^2 overflows float16"


# The latent space


def test_draws_from_the_posterior_equal_the_fixture(fixture: dict[str, np.ndarray]) -> None:
    moments = torch.from_numpy(fixture["moments"])
    mean, std = torch.from_numpy(fixture["mean"]), torch.from_numpy(fixture["std"])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        LatentSpace().normalize(diffusion.draw_latents(moments, noise)), 0.23010 * (mean + std * noise)
    )


def test_log_variance_is_clipped() -> None:
    moments = torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1)
    assert diffusion.draw_latents(moments, torch.ones(1, 1, 1, 1)).item() == pytest.approx(np.exp(10), rel=1e-5)
