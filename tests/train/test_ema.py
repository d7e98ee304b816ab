"""The average follows its definition, in float32, and is nobody's alias."""

import torch
from torch import nn

from uvit.train.optimizer import EMA, checksum


def test_it_follows_its_definition() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.9)
    expected = 0.0
    for value in range(1, 21):
        nn.init.constant_(model.weight, value)
        ema.update(model)
        expected = 0.9 * expected + 0.1 * value
        torch.testing.assert_close(ema.model.weight.item(), expected, rtol=1e-6, atol=0)


def test_it_moves_by_less_than_low_precision_could_hold() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.9999)
    nn.init.constant_(model.weight, 1.01)
    ema.update(model)
    assert 1 < ema.model.weight.item() < 1.00001
    assert ema.model.weight.dtype == torch.float32 and not ema.model.weight.requires_grad
    assert model.weight.requires_grad


def test_bits_tell_whether_anything_moved() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = checksum(model)
    assert checksum(model) == before
    with torch.no_grad():
        model[1].bias[1] = torch.nextafter(model[1].bias[1], torch.tensor(9.0))
    assert checksum(model) != before
