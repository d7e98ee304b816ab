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
        {"guidance_scale": float("nan")},
        {"guidance_scale": -1.0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_named(flag: dict) -> None:
    ((name, value),) = flag.items()
    with pytest.raises(UserError, match=f"--{name} {value}: "):
        SampleConfig(pipeline="p", **flag)


def test_prompts_need_no_flag() -> None:
    words = ["a red circle", "-", "--pipeline", "p", "--guidance_scale", "2"]
    config, _ = parse(SampleConfig, words, "uvit sample", positional=("prompts",))
    assert config == SampleConfig(pipeline="p", prompts=("a red circle", "-"), guidance_scale=2.0)
