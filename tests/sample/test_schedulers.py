import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tests.sample.parts import MIXTURE, NAMES, mixture_flow, mixture_predictor
from uvit.config.sample import SampleConfig
from uvit.diffusion import alphas_cumprod, log_snr, scheduler_config, timestep_of_log_snr
from uvit.sample.denoise import denoise
from uvit.sample.schedulers import OfficialScheduler, build_scheduler, check_scheduler, set_timesteps

NOISE = torch.linspace(-2.5, 2.5, 32).view(1, 1, 4, 8)
CONTEXT = torch.zeros(1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_has_our_noise_schedule(name: str) -> None:
    scheduler = build_scheduler(name)
    assert scheduler.alphas_cumprod.numpy() == pytest.approx(alphas_cumprod()[1:].numpy(), rel=1e-4)
    check_scheduler(scheduler)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_starts_from_pure_noise(name: str, num_steps: int) -> None:
    scheduler = build_scheduler(name)
    set_timesteps(scheduler, num_steps)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_any_swaps_for_any_in_diffusers_way(name: str, other: str) -> None:
    swapped = type(build_scheduler(other)).from_config(build_scheduler(name).config)
    check_scheduler(swapped)
    assert swapped.config.prediction_type == "epsilon"


def test_default_is_dpm_solver() -> None:
    assert isinstance(build_scheduler(), DPMSolverMultistepScheduler)
    assert build_scheduler(SampleConfig(pipeline="p").scheduler).config == build_scheduler().config


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "another noise schedule"),
        (DDIMScheduler(**scheduler_config()), "clip"),
        (
            DDIMScheduler(**scheduler_config(), clip_sample=False, rescale_betas_zero_snr=True),
            "noise schedule",
        ),
    ],
)
def test_one_that_does_not_fit_is_refused(scheduler: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler)


def test_schedule_survives_saving(tmp_path) -> None:  # type: ignore[no-untyped-def]
    build_scheduler().save_pretrained(tmp_path)
    loaded = DDIMScheduler.from_pretrained(tmp_path)
    check_scheduler(loaded)
    loaded.set_timesteps(50)
    assert torch.equal(loaded.timesteps, torch.arange(999, 0, -20))


class Even(OfficialScheduler):
    """On even log-SNRs: of even labels the last few are far apart, and no order shows below a thousand steps."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)
        log_snrs = torch.linspace(*log_snr(torch.tensor([1000, 1])).tolist(), num_inference_steps + 1)
        self.sigmas = torch.exp(-log_snrs.double() / 2).float()
        self.timesteps = (timestep_of_log_snr(log_snrs)[:-1] - 1).float()


def error(scheduler: Any, num_steps: int) -> float:
    """Root mean square distance to the end of the exact flow, from what the scheduler makes of the noise."""
    scheduler.set_timesteps(num_steps)
    start = scheduler.scale_model_input(NOISE * scheduler.init_noise_sigma, scheduler.timesteps[0])
    x_1, x_0 = mixture_flow(start.double().numpy())
    drawn = denoise(mixture_predictor, scheduler, NOISE, CONTEXT, CONTEXT, 1, num_steps, "epsilon").numpy()
    return float(np.sqrt(np.mean((drawn - (x_1 if isinstance(scheduler, OfficialScheduler) else x_0)) ** 2)))


# A corrector makes UniPC's second order a third. Heun's two, on even labels, is not quite reached.
@pytest.mark.parametrize(
    ("name", "steps", "order"),
    [
        ("ddim", (50, 100, 200), 1),
        ("euler", (25, 50, 100), 1),
        ("heun", (50, 100, 200), 2),
        ("dpmsolver++", (20, 40, 80), 2),
        ("unipc", (10, 20, 40), 3),
        ("official", (11, 23, 47), 3),
    ],
)
def test_converges_at_its_order(name: str, steps: tuple[int, ...], order: int) -> None:
    scheduler = Even.from_config(build_scheduler(name).config) if name == "official" else build_scheduler(name)
    errors = [error(scheduler, n) for n in steps]
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < np.log2(coarse / fine) < order + 0.6, errors


def test_official_sampler_is_close_after_its_fifty_evaluations() -> None:
    assert error(build_scheduler("official"), 50) < 0.01
    assert error(build_scheduler("official"), 302) < 0.001


def test_ddpm_converges_in_distribution() -> None:
    noise = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    share, mean, std = MIXTURE
    rng = np.random.default_rng(1)
    of = rng.choice(3, p=share, size=noise.numel())
    data = np.sort(rng.normal(mean[of], std[of]))

    def distance(num_steps: int) -> float:
        """Wasserstein's, between as many values drawn and values of the data."""
        generator, context = torch.Generator().manual_seed(2), CONTEXT.expand(16, 1, 1)
        ddpm = build_scheduler("ddpm")
        drawn = denoise(mixture_predictor, ddpm, noise, context, context, 1, num_steps, "epsilon", generator)
        return float(np.abs(np.sort(drawn.flatten().numpy()) - data).mean())

    coarse, fine = distance(10), distance(100)
    assert fine < 0.03
    assert coarse > 4 * fine


def test_official_sampler_stands_where_the_published_one_does() -> None:
    """Fifty evaluations at even, fractional labels from 1000; third-order steps, and the rest in a lower order."""
    seen: list[float] = []

    def network(x_n: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps[0].item())
        return x_n

    official = build_scheduler("official")
    denoise(network, official, NOISE, CONTEXT, CONTEXT, 1, 50, "epsilon")
    assert seen == pytest.approx([1000 - 19.98 * i for i in range(50)])
    for n, orders in (
        (50, [1, 2, 3] * 16 + [1, 2]),
        (9, [1, 2, 3] * 2 + [1, 2, 1]),
        (10, [1, 2, 3] * 3 + [1]),
        (1, [1]),
    ):
        official.set_timesteps(n)
        assert official.order_list == orders


def third_order_step(x: np.ndarray, labels: list[float]) -> np.ndarray:
    """DPM-Solver++(3S), algorithm 2 of Lu et al. 2022, between labels[0] and labels[3] with what is between them."""
    snr = log_snr(torch.tensor(labels, dtype=torch.float64))
    a, s = torch.sigmoid(snr).sqrt().numpy(), torch.sigmoid(-snr).sqrt().numpy()
    lam = (snr / 2).numpy()

    def x_0(i: int, x_n: np.ndarray) -> np.ndarray:
        noise = mixture_predictor(torch.from_numpy(x_n), torch.tensor(labels[i : i + 1]), CONTEXT).numpy()
        return (x_n - s[i] * noise) / a[i]

    h = lam[3] - lam[0]
    r1, r2 = (lam[1] - lam[0]) / h, (lam[2] - lam[0]) / h
    d0 = x_0(0, x)
    d1 = x_0(1, s[1] / s[0] * x - a[1] * np.expm1(-r1 * h) * d0) - d0
    inner = s[2] / s[0] * x - a[2] * np.expm1(-r2 * h) * d0
    d2 = x_0(2, inner + a[2] * r2 / r1 * (np.expm1(-r2 * h) / (r2 * h) + 1) * d1) - d0
    return s[3] / s[0] * x - a[3] * np.expm1(-h) * d0 + a[3] / r2 * (np.expm1(-h) / h + 1) * d2


def test_official_sampler_steps_as_the_published_one_does() -> None:
    """Beginning with 2/3 of 5 evaluations: one step of third order, whose inside diffusers takes differently."""
    labels = [1000 - 199.8 * i for i in range(6)]
    states: list[np.ndarray] = []

    def on_step(i: int, t: Any, latents: torch.Tensor) -> torch.Tensor:
        states.append(latents.numpy())
        return latents

    denoise(mixture_predictor, build_scheduler("official"), NOISE, CONTEXT, CONTEXT, 1, 5, "epsilon", on_step=on_step)
    wanted = third_order_step(NOISE.double().numpy(), labels[:4])
    assert np.abs(states[2] - wanted).max() < 1e-5
