import pytest

from uvit.config.evaluate import EvaluateConfig
from uvit.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"), [("split", "test"), ("max_prompts", 0), ("num_inference_steps", 0), ("batch_size", 0)]
)
def test_values_that_cannot_work_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^--{name} {value}: must be "):
        EvaluateConfig("pipeline", "out", **{name: value})  # type: ignore[arg-type]
