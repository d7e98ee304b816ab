"""Noise of `--noise_device device`: Philox to the letter, the same bits from NumPy and torch, and normal numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit.train.noise import GRID, draw_noise, normal_on_device, normal_on_host, philox, quantiles

ONES = 2**64 - 1


def test_philox_is_that_of_its_authors() -> None:
    """The known answer for counter and key 0 of Random123, and NumPy's words for other counters and keys."""
    words = [word % 2**64 for word in philox(torch.tensor([0]), 0, 0)[0].tolist()]
    assert words == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    for seed, stream, first in [(1, 7, 0), (ONES, ONES, 2**62), (0x452821E638D01377, 0xBE5466CF34E90C6C, 12345)]:
        key = np.array([seed, stream], np.uint64)
        expected = np.random.Philox(key=key, counter=[first, 0, 0, 0]).random_raw(12)
        found = philox(torch.arange(first + 1, first + 4), seed, stream).flatten().numpy().view(np.uint64)
        assert np.array_equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 5), st.integers(0, 2**64 - 1), st.integers(1, 70))
def test_host_and_device_draw_the_same_bits(first: int, count: int, seed: int, num: int) -> None:
    host = normal_on_host(first, count, seed, 7, num)
    assert np.array_equal(normal_on_device(torch.tensor(first), count, seed, 7, num).numpy(), host)
    assert np.array_equal(host[1:], normal_on_host(first + 1, count - 1, seed, 7, num))  # each sample has its own


def test_the_numbers_are_normal() -> None:
    """Moments and tails, within four standard errors, and no correlation of the two that come from the same bits."""
    x = normal_on_host(0, 128, 3, 7, 8192).astype(np.float64)
    n = x.size
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (x**power).mean() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    for limit in (1, 2, 3, 4):
        share = math.erfc(limit / math.sqrt(2))
        assert (abs(x) > limit).mean() == pytest.approx(share, abs=4 * math.sqrt(share / n))
    t, u = x.reshape(-1, 2, 4096).transpose(1, 0, 2).reshape(2, -1)
    assert abs(np.corrcoef(t, u)[0, 1]) < 4 / math.sqrt(n / 2) > abs(np.corrcoef(t**2, u**2)[0, 1])


def test_all_sums_are_exact() -> None:
    """So that no compiler can change a bit: multiples of 2^-20 that have fewer than 24 bits."""
    table = quantiles(torch.device("cpu")).double() / GRID
    assert torch.equal(table, table.round()) and 2 * table.abs().max() < 2**24
    assert torch.equal(table, -table.flip(0)) and (table.diff() >= 0).all()


@pytest.mark.parametrize("options", [{}, {"posterior": False}, {"noise_offset": 0.5}])
def test_the_noises_of_a_batch(options: dict[str, Any]) -> None:
    shape = (4, 6, 6)
    posterior, noise = draw_noise(10, 64, 1, shape, **options)
    on_device = draw_noise(torch.tensor(10), 64, 1, shape, **options)
    assert torch.equal(on_device[1], noise) and noise.shape == (64, *shape)
    if options.get("posterior", True):
        assert posterior is not None and torch.equal(on_device[0], posterior)  # type: ignore[arg-type]
        assert not torch.equal(posterior, noise)
    else:
        assert posterior is None and on_device[0] is None
    variance = noise.mean(dim=(2, 3)).var().item()  # of the mean of a channel
    assert variance == pytest.approx(1 / 36 + options.get("noise_offset", 0) ** 2, rel=0.4)
