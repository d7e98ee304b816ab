import pytest

from uvit.cli.parse import parse
from uvit.config.sample import SampleConfig
from uvit.errors import UserError


@pytest.mark.parametrize(
    "flag",
    [
        {"num_images_per_prompt": 0},
        {"batch_size": 0},
        {"columns": -1},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"guidance_scale": (float("nan"),)},
        {"guidance_scale": (2.0, -1.0)},
        {"seed": -1},
        {"strength": 0.5},
        {"mask": "m.png"},
        {"strength": 0.0, "init_image": "i.png"},
        {"strength": 0.01, "init_image": "i.png"},
        {"columns": 2, "grid": False},
        {"init_image": "i.png", "fit_schedule": True},
        {"compare_with": ("other",), "fit_schedule": True},
        {"scheduler": "euler", "fit_schedule": True},
        {"shard": "0/2", "fit_schedule": True},
        {"shard": "4/4"},
        {"shard": "a"},
    ],
)
def test_values_out_of_range_are_named(flag: dict) -> None:
    name, value = next(iter(flag.items()))
    value = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=f"--{name} {value}: "):
        SampleConfig(pipeline="p", **flag)


def test_prompts_need_no_flag() -> None:
    words = ["a red circle", "-", "--pipeline", "p", "--guidance_scale", "2"]
    config, _ = parse(SampleConfig, words, "uvit sample", positional=("prompts",))
    assert config == SampleConfig(pipeline="p", prompts=("a red circle", "-"), guidance_scale=(2.0,))


def test_several_guidance_scales_or_none() -> None:
    words = ["a", "--pipeline", "p", "--guidance_scale", "2", "4", "7.5", "--shard", "1/4"]
    config, _ = parse(SampleConfig, words, "uvit sample", positional=("prompts",))
    assert config.guidance_scale == (2.0, 4.0, 7.5)
    assert config.shard == "1/4"
    with pytest.raises(UserError, match="--guidance_scale: needs a value"):
        SampleConfig("p", guidance_scale=())


def test_numbers_end_where_the_prompts_begin() -> None:
    config, _ = parse(
        SampleConfig,
        ["--pipeline", "p", "--guidance_scale", "2", "4", "a red circle", "b"],
        "uvit sample",
        ("prompts",),
    )
    assert config.guidance_scale == (2.0, 4.0) and config.prompts == ("a red circle", "b")


def test_a_speed_chooses_solver_and_steps() -> None:
    config = SampleConfig("p", speed="fast", seed=3).resolved()
    assert config == SampleConfig("p", scheduler="fitted", num_inference_steps=8, seed=3)
    assert SampleConfig("p", seed=3).resolved() == SampleConfig("p", seed=3)
    for other in ({"num_inference_steps": 20}, {"scheduler": "unipc"}):
        with pytest.raises(UserError, match="--speed fast: sets"):
            SampleConfig("p", speed="fast", **other)
    for flag in ({"speed": "fast"}, {"scheduler": "fitted"}):
        with pytest.raises(UserError, match=r"--init_image a\.png: the fitted solver starts from pure noise"):
            SampleConfig("p", init_image="a.png", **flag)


def test_guidance_interval() -> None:
    words = ["--pipeline", "p", "--guidance_interval", "100", "1000", "a red circle"]
    config, _ = parse(SampleConfig, words, "uvit sample", ("prompts",))
    assert (config.guidance_interval, config.prompts) == ((100, 1000), ("a red circle",))
    for wrong in ((0, 10), (10, 5), (1, 1001)):
        with pytest.raises(UserError, match=r"--guidance_interval (0|10 5|1001): "):
            SampleConfig("p", guidance_interval=wrong)
