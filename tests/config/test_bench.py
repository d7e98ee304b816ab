import pytest

from uvit.config.bench import BenchConfig
from uvit.errors import UserError


@pytest.mark.parametrize("name", ["batch_size", "steps", "matmul_size"])
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(UserError, match=rf"^--{name} 0: must be (at least 1|in 1[.][.][0-9,]+)$"):
        BenchConfig(**{name: 0})


def test_threads_may_be_left_to_pytorch() -> None:
    assert BenchConfig().num_threads == 0
    with pytest.raises(UserError, match=r"^--num_threads -1: "):
        BenchConfig(num_threads=-1)
