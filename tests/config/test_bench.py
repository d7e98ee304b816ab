import pytest

from uvit.config.bench import BenchConfig
from uvit.errors import UserError


def test_there_is_at_least_one_step() -> None:
    with pytest.raises(UserError, match=r"^--steps 0: must be at least 1$"):
        BenchConfig(steps=0)


@pytest.mark.parametrize("name", ["num_threads", "batch_size", "matmul_size"])
def test_sizes_may_be_left_to_the_machine(name: str) -> None:
    assert getattr(BenchConfig(), name) == 0
    with pytest.raises(UserError, match=rf"^--{name} -1: "):
        BenchConfig(**{name: -1})
