"""The average follows its definition, in float32, and is nobody's alias."""

import pytest
import torch
from torch import nn

from uvit.checkpoint.averages import gamma_of
from uvit.train.ema import EMA, checksum


def test_it_follows_its_definition() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.9)
    expected = 0.0
    for value in range(1, 21):
        nn.init.constant_(model.weight, value)
        ema.update(model, value)
        expected = 0.9 * expected + 0.1 * value
        torch.testing.assert_close(ema.model.weight.item(), expected, rtol=1e-6, atol=0)


def test_it_moves_by_less_than_low_precision_could_hold() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.9999)
    nn.init.constant_(model.weight, 1.01)
    ema.update(model, 1)
    assert 1 < ema.model.weight.item() < 1.00001
    assert ema.model.weight.dtype == torch.float32 and not ema.model.weight.requires_grad
    assert model.weight.requires_grad


def test_an_update_of_several_steps_is_one_with_the_decay_of_so_many() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.9, update_steps=3)
    found = []
    for step in range(1, 8):
        nn.init.constant_(model.weight, step)
        ema.update(model, step, skipped=torch.tensor(step == 6))
        found.append(ema.model.weight.item())
    at_3 = 3 * (1 - 0.9**3)
    at_6 = at_3 * 0.9**3 + 6 * (1 - 0.9**3)
    assert found == pytest.approx([0, 0, at_3, at_3, at_3, at_6, at_6])


def test_a_skipped_step_does_not_count_by_itself() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.9)
    nn.init.constant_(model.weight, 5)
    before = checksum(ema.model)
    ema.update(model, 1, skipped=torch.tensor(True))
    assert checksum(ema.model) == before


def test_lengths_weigh_steps_by_a_power_and_begin_with_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.5, lengths=(0.1, 0.2))
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values.tolist(), start=1):
        nn.init.constant_(model.weight, value)
        ema.update(model, step)
        if step == 1:
            assert ema.model.weight.item() == pytest.approx(value)
    for length, average in zip(ema.lengths, ema.models, strict=True):
        ends = (torch.arange(10, dtype=torch.float64) / 9) ** (gamma_of(length) + 1)
        assert average.weight.item() == pytest.approx((ends.diff() * values).sum().item(), rel=1e-5)
    assert list(ema.further_tensors()) == ["0.2/weight"]


def test_bits_tell_whether_anything_moved() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = checksum(model)
    assert checksum(model) == before
    with torch.no_grad():
        model[1].bias[1] = torch.nextafter(model[1].bias[1], torch.tensor(9.0))
    assert checksum(model) != before
