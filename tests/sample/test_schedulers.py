import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tests.sample.parts import NAMES
from uvit.config.sample import SampleConfig
from uvit.diffusion import alphas_cumprod, scheduler_config
from uvit.sample.schedulers import build_scheduler, check_scheduler


@pytest.mark.parametrize("name", NAMES)
def test_has_our_noise_schedule(name: str) -> None:
    scheduler = build_scheduler(name)
    assert scheduler.alphas_cumprod.numpy() == pytest.approx(alphas_cumprod()[1:].numpy(), rel=1e-4)
    check_scheduler(scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_starts_from_pure_noise(name: str) -> None:
    scheduler = build_scheduler(name)
    scheduler.set_timesteps(20)
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
