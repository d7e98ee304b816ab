"""The Inception Score and the CLIP score equal the reference; a mean's interval covers it."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluate.reference import EXPECTED, tensor
from uvit.errors import UserError
from uvit.evaluate.scores import clip_score, clip_similarities, inception_score, mean_interval


@pytest.mark.parametrize("case", [case for case in EXPECTED["inception_score"] if case["shuffle"]])
def test_the_inception_score_equals_torch_fidelity(case: dict[str, Any]) -> None:
    settings = {name: case[name] for name in ("num_splits", "seed")}
    assert inception_score(tensor("logits"), **settings) == pytest.approx(case["mean_std"], rel=1e-12, abs=1e-12)


def test_the_inception_score_at_its_ends() -> None:
    assert inception_score(torch.zeros(20, 7), num_splits=2) == pytest.approx((1, 0))
    certain = 1e4 * torch.eye(7).repeat(10, 1)  # probabilities of exactly 0 and 1
    assert inception_score(certain, num_splits=1)[0] == pytest.approx(7)
    assert inception_score(torch.tensor([[1.0, 2.0]]), num_splits=1) == pytest.approx((1, 0))


def test_the_clip_score_equals_the_reference() -> None:
    similarities = clip_similarities(tensor("clip_image"), tensor("clip_text"))
    assert clip_score(similarities) == pytest.approx(EXPECTED["clip_score"]["mean"], rel=1e-12)
    assert clip_score(torch.tensor([-3.0, 1.0])) == 0


def test_intervals_cover_the_mean() -> None:
    covered = 0
    for trial in range(200):
        values = torch.randn(80, generator=torch.Generator().manual_seed(trial)) + 5
        low, high = mean_interval(values, num_resamples=200)
        covered += low <= 5 <= high
    assert 178 <= covered <= 199  # 190 are expected of intervals of 95%, less a few for 80 values
    assert mean_interval(torch.tensor([2.0])) == (2, 2)
    wide, narrow = (np.diff(mean_interval(tensor("clip_image")[:, 0], level=level)) for level in (0.99, 0.5))
    assert wide > narrow


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"with 10 splits needs as many images, and there are 4"):
        inception_score(torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"^Inception Score: of the images, number 2 has"):
        inception_score(torch.tensor([[0.0], [0.0], [math.nan]]), num_splits=1)
    with pytest.raises(UserError, match=r"^CLIP score: of the captions, number 0 has"):
        clip_similarities(torch.zeros(1, 2), torch.full((1, 2), math.inf))
    with pytest.raises(UserError, match=r"^CLIP score: there are no images"):
        clip_score(torch.zeros(0))
    with pytest.raises(UserError, match=r"no images"):
        mean_interval(torch.zeros(0))
