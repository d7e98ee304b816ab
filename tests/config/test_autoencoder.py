import pytest

from uvit.config.autoencoder import AutoencoderConfig
from uvit.errors import UserError


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("resolution", 30, "must be a multiple of --factor"),
        ("channels", 12, "must be a multiple of 8"),
        ("max_steps", 0, "must be at least 1"),
        ("batch_size", 0, "must be at least 1"),
    ],
)
def test_values_that_cannot_work_are_named(name: str, value: int, reason: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} {value}: {reason}"):
        AutoencoderConfig(source="shapes", output_dir="out", **{name: value})
