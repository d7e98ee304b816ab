"""The distance equals the reference, also without full rank; statistics are those of torch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.reference import EXPECTED, GAUSSIANS, feature_sets
from uvit.errors import UserError
from uvit.evaluate.frechet import (
    ROWS_AT_ONCE,
    FeatureStatistics,
    frechet_distance,
    frechet_distance_at_infinity,
    statistics_of,
)


@pytest.mark.parametrize("name", EXPECTED["fid"])
def test_it_equals_the_reference(name: str) -> None:
    generated, reference = map(statistics_of, feature_sets(name))
    # The singular values of a 2,048 x 2,048 matrix are exact to about 1e-13 of the largest.
    assert frechet_distance(generated, reference) == pytest.approx(EXPECTED["fid"][name], rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("name", EXPECTED["gaussians"])
def test_it_equals_the_exact_value_of_gaussians(name: str) -> None:
    first, second = (
        FeatureStatistics(*(torch.from_numpy(GAUSSIANS[f"{name}/{key}{i}"]) for key in ("mu", "sigma"))) for i in (1, 2)
    )
    assert frechet_distance(first, second) == pytest.approx(EXPECTED["gaussians"][name], rel=1e-13, abs=1e-13)
    assert frechet_distance(second, first) == pytest.approx(EXPECTED["gaussians"][name], rel=1e-13, abs=1e-13)


@given(n=st.integers(2, 40), width=st.integers(1, 30), scale=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 99))
def test_equal_sets_are_at_zero_and_nothing_is_below(n: int, width: int, scale: float, seed: int) -> None:
    statistics = statistics_of(scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))
    trace = statistics.covariance.trace().item()
    assert 0 <= frechet_distance(statistics, statistics) <= 1e-13 * trace


@pytest.mark.parametrize("num_rows", [2, 5, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 2 * ROWS_AT_ONCE + 77])
def test_statistics_are_the_mean_and_the_covariance(num_rows: int) -> None:
    features = torch.randn(num_rows, 7, dtype=torch.float64) * torch.logspace(-1, 1, 7) + 10
    given = features.clone()
    result = statistics_of(features)
    assert torch.equal(features, given) and result.num_images == num_rows
    torch.testing.assert_close(result.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(result.covariance, features.T.cov(), rtol=1e-11, atol=1e-13)


def test_a_large_mean_costs_no_digits() -> None:
    features = 1e8 + torch.randn(5000, 3, dtype=torch.float64)
    expected = (features - 1e8).T.cov()
    torch.testing.assert_close(statistics_of(features).covariance, expected, rtol=0, atol=1e-7)  # 1e8 has 1e-8 left


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"^no images have no covariance"):
        statistics_of(torch.zeros(0, 3))
    with pytest.raises(UserError, match=r"^1 image has no covariance.*at least 2"):
        statistics_of(torch.zeros(1, 3))
    features = torch.zeros(15, 3)
    features[13, 1] = math.nan
    with pytest.raises(UserError, match=r"number 13 has features that are NaN"):
        statistics_of(features)
    with pytest.raises(UserError, match=r"statistics of 3 and of 4 features"):
        frechet_distance(statistics_of(torch.zeros(2, 3)), statistics_of(torch.zeros(2, 4)))


def test_the_distance_at_infinity_has_less_bias() -> None:
    torch.manual_seed(0)
    reference = FeatureStatistics(torch.zeros(16).double(), torch.eye(16).double())
    features = torch.randn(2000, 16)
    at_n = frechet_distance(statistics_of(features), reference)
    at_infinity = frechet_distance_at_infinity(features, reference, smallest=200)
    assert at_n > 0.03 and abs(at_infinity) < at_n / 3
    assert frechet_distance_at_infinity(features, reference, smallest=200) == at_infinity  # one seed, one value


def test_the_distance_at_infinity_needs_a_few_images() -> None:
    reference = statistics_of(torch.randn(9, 2))
    assert math.isfinite(frechet_distance_at_infinity(torch.randn(4, 2), reference))
    with pytest.raises(UserError, match=r"^3 images are too few"):
        frechet_distance_at_infinity(torch.randn(3, 2), reference)
