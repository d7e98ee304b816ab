"""Properties of the diffusion process, and its constants against arrays of another implementation."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit import diffusion
from uvit.conventions import PREDICTION_TYPES, DiffusionPath, LatentSpace, LossType, PredictionType
from uvit.diffusion import NUM_TIMESTEPS

PATHS = get_args(DiffusionPath)
CASES = [(path, kind) for path in PATHS for kind in PREDICTION_TYPES[path]]
PAIRS = [(path, kind, other) for path, kind in CASES for other in PREDICTION_TYPES[path]]
labels = st.lists(st.integers(1, NUM_TIMESTEPS), min_size=3, max_size=3).map(torch.tensor)
fractions = st.lists(st.floats(1, NUM_TIMESTEPS), min_size=3, max_size=3).map(lambda n: torch.tensor(n).double())
paths = st.sampled_from(PATHS)
cases = st.sampled_from(CASES)
pairs = st.sampled_from(PAIRS)
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


def test_zero_terminal_snr_is_the_rescaling_of_diffusers() -> None:
    abar = diffusion.alphas_cumprod(path="vp_zero_snr")
    betas = 1 - diffusion.alphas_cumprod()[1:] / diffusion.alphas_cumprod()[:-1]
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(abar[1:-1], rescaled[:-1])
    assert (abar[-1], rescaled[-1]) == (2**-24, 0)
    scheduler = DPMSolverMultistepScheduler(**diffusion.scheduler_config(path="vp_zero_snr"))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), abar[1:], rtol=1e-3, atol=0)


@few
@given(n=st.floats(1, NUM_TIMESTEPS), path=paths)
def test_timestep_to_snr_and_back(n: float, path: DiffusionPath) -> None:
    timestep = torch.tensor([n], dtype=torch.float64)
    there = diffusion.log_snr(timestep, path)
    assert diffusion.timestep_of_log_snr(there, path).item() == pytest.approx(n, abs=1e-6)


def test_log_snr_falls_and_ends_are_held() -> None:
    values = diffusion.log_snr(torch.arange(1, NUM_TIMESTEPS + 1))
    assert (values.diff() < 0).all()
    abar = diffusion.alphas_cumprod()
    torch.testing.assert_close(values.exp(), abar[1:] / (1 - abar[1:]))
    assert diffusion.timestep_of_log_snr(torch.tensor([100.0, -100.0])).tolist() == [1, NUM_TIMESTEPS]


@pytest.mark.parametrize("path", ["vp", "vp_zero_snr"])
@few
@given(timesteps=labels)
def test_variance_is_preserved(path: DiffusionPath, timesteps: torch.Tensor) -> None:
    a, s = diffusion.signal_and_noise(timesteps, torch.zeros(3, 4, 2, 2, dtype=torch.float64), path)
    assert a.shape == s.shape == (3, 1, 1, 1)
    torch.testing.assert_close(a**2 + s**2, torch.ones(3, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(a.flatten() ** 2, diffusion.alphas_cumprod(path=path)[timesteps])


@few
@given(timesteps=fractions)
def test_a_linear_path_is_a_straight_line(timesteps: torch.Tensor) -> None:
    x_0, noise = draws(0)
    t = (timesteps / 1000).view(3, 1, 1, 1)
    torch.testing.assert_close(diffusion.add_noise(x_0, noise, timesteps, "linear"), (1 - t) * x_0 + t * noise)
    last = torch.tensor([1000, 1000, 1000])
    assert torch.equal(diffusion.add_noise(x_0, noise, last, "linear"), noise)


# What the network predicts


@few
@given(timesteps=fractions, case=cases, seed=seeds)
def test_target_recovers_x_0_and_noise(
    timesteps: torch.Tensor, case: tuple[DiffusionPath, PredictionType], seed: int
) -> None:
    (path, kind), (x_0, noise) = case, draws(seed)
    x_n = diffusion.add_noise(x_0, noise, timesteps, path)
    target = diffusion.target(x_0, noise, timesteps, kind, path)
    found = diffusion.split_prediction(target, x_n, timesteps, kind, path)
    torch.testing.assert_close(found, (x_0, noise), atol=1e-9, rtol=1e-9)


@few
@given(timesteps=fractions, pair=pairs, seed=seeds)
def test_conversion_there_and_back(
    timesteps: torch.Tensor, pair: tuple[DiffusionPath, PredictionType, PredictionType], seed: int
) -> None:
    path, kind, other = pair
    prediction, x_n = draws(seed)  # any prediction, not only a perfect one
    there = diffusion.convert_prediction(prediction, x_n, timesteps, kind, other, path)
    back = diffusion.convert_prediction(there, x_n, timesteps, other, kind, path)
    torch.testing.assert_close(back, prediction, atol=1e-9, rtol=1e-9)


@few
@given(timesteps=fractions, pair=pairs, seed=seeds)
def test_conversion_turns_one_target_into_the_other(
    timesteps: torch.Tensor, pair: tuple[DiffusionPath, PredictionType, PredictionType], seed: int
) -> None:
    path, kind, other = pair
    x_0, noise = draws(seed)
    converted = diffusion.convert_prediction(
        diffusion.target(x_0, noise, timesteps, kind, path),
        diffusion.add_noise(x_0, noise, timesteps, path),
        timesteps,
        kind,
        other,
        path,
    )
    target = diffusion.target(x_0, noise, timesteps, other, path)
    torch.testing.assert_close(converted, target, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES["vp"])
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


def guessed(path: DiffusionPath, kind: PredictionType, timesteps: torch.Tensor, seed: int, **weights: Any) -> Any:
    """-> (the loss of a guess of x_0, expressed as a prediction; the guess's squared errors of x_0)."""
    x_0, noise = draws(seed)
    guess = x_0 + draws(seed + 1)[0]
    x_n = diffusion.add_noise(x_0, noise, timesteps, path)
    prediction = diffusion.convert_prediction(guess, x_n, timesteps, "sample", kind, path)
    losses = diffusion.sample_losses(prediction, x_0, noise, timesteps, kind, path=path, **weights)
    return losses.mean().double(), (guess - x_0).square().mean(dim=(1, 2, 3))


# float32 has seven digits, of which an error of epsilon at high noise, or of v at low noise, loses some.
@few
@given(timesteps=labels, case=cases, gamma=st.floats(0.1, 20), seed=seeds)
def test_min_snr_loss_is_the_same_in_every_parametrisation(
    timesteps: torch.Tensor, case: tuple[DiffusionPath, PredictionType], gamma: float, seed: int
) -> None:
    """A guess of x_0, expressed in any way, has one min-SNR loss: min(SNR, gamma) (x_0 - guess)^2."""
    loss, errors = guessed(*case, timesteps, seed, snr_gamma=gamma)
    weight = diffusion.log_snr(timesteps, case[0]).exp().clamp(max=gamma)
    torch.testing.assert_close(loss, (weight * errors).mean(), rtol=1e-3, atol=1e-6)


@few
@given(timesteps=labels, case=cases, space=st.sampled_from(["x", "v", "epsilon"]), seed=seeds)
def test_loss_in_a_space_is_the_same_in_every_parametrisation(
    timesteps: torch.Tensor, case: tuple[DiffusionPath, PredictionType], space: LossType, seed: int
) -> None:
    """In terms of the error of x_0: 1, 1 / s^2 and (a / s)^2, and at most the cap."""
    path, kind = case
    a, s = (values.flatten() for values in diffusion.signal_and_noise(timesteps, draws(0)[0], path))
    weight = {"x": torch.ones_like(s), "v": 1 / s**2, "epsilon": (a / s) ** 2}[space]
    for cap in (1e9, 400.0, 6.25):
        loss, errors = guessed(path, kind, timesteps, seed, loss_type=space, loss_weight_max=cap)
        torch.testing.assert_close(loss, (weight.clamp(max=cap) * errors).mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("path", "kind"), CASES)
def test_the_error_of_what_is_predicted_is_its_own_space(path: DiffusionPath, kind: PredictionType) -> None:
    timesteps, own = torch.tensor([1, 30, 500, 970, 1000]), {"epsilon": "epsilon", "sample": "x"}.get(kind, "v")
    spaces: list[LossType] = ["prediction", own]  # type: ignore[list-item]
    for space in spaces:
        assert torch.equal(diffusion.loss_weight(timesteps, kind, None, space, None, path), torch.ones(5))


@few
@given(timesteps=labels, case=cases, seed=seeds)
def test_loss_is_zero_at_the_target_and_the_mean_square_beside_it(
    timesteps: torch.Tensor, case: tuple[DiffusionPath, PredictionType], seed: int
) -> None:
    (path, kind), (x_0, noise) = case, (x.float() for x in draws(seed))
    target = diffusion.target(x_0, noise, timesteps, kind, path)
    for gamma in (None, 5.0):
        assert diffusion.sample_losses(target, x_0, noise, timesteps, kind, gamma, path=path).mean() == 0
    beside = diffusion.sample_losses(target + 2, x_0, noise, timesteps, kind, path=path).mean()
    assert beside.item() == pytest.approx(4, rel=1e-5)


def test_loss_of_half_precision_predictions_is_taken_in_float32() -> None:
    x_0, noise = (x.float() for x in draws(0))
    loss = diffusion.sample_losses(torch.full_like(noise, 300).half(), x_0, noise, torch.tensor([1, 2, 3])).mean()
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
