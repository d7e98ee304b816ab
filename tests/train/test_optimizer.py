"""Learning rates by step, and AdamW's parameter groups."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from uvit.train.optimizer import build_optimizer, learning_rate_factor, set_learning_rate


def factors(config: Any, steps: int) -> list[float]:
    return [learning_rate_factor(step, config, steps) for step in range(steps)]


def test_the_first_update_has_rate_zero_and_the_warm_up_is_linear(tiny_config: Any) -> None:
    got = factors(tiny_config(warmup_steps=4), 8)
    assert got == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert factors(tiny_config(warmup_steps=0, warmup_ratio=0.5), 8) == got
    assert factors(tiny_config(warmup_steps=0), 3) == [0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "flags", "middle", "last"),
    [
        ("linear", {}, 0.5, 1 / 100),
        ("cosine", {}, 0.5, 0.5 * (1 - math.cos(math.pi / 100))),
        ("cosine", {"num_cycles": 1.0}, 0.0, 0.5 * (1 + math.cos(2 * math.pi / 100))),
        ("cosine_with_restarts", {"num_cycles": 2.0}, 1.0, 0.5 * (1 - math.cos(2 * math.pi / 100))),
        ("polynomial", {"power": 2.0, "lr_end": 0.0}, 0.25, 0.0001),
        ("polynomial", {"lr_end": 1e-4}, 0.55, 0.1 + 0.9 / 100),
        ("constant_with_warmup", {}, 1.0, 1.0),
        ("linear", {"min_lr": 5e-4}, 0.5, 0.5),
    ],
)
def test_what_follows_the_warm_up(
    kind: str, flags: dict[str, Any], middle: float, last: float, tiny_config: Any
) -> None:
    config = tiny_config(lr_scheduler_type=kind, warmup_steps=1, **flags)  # the peak is 1e-3
    got = factors(config, 101)
    assert got[1] == pytest.approx(1)
    assert got[51] == pytest.approx(middle, abs=1e-12)
    assert got[100] == pytest.approx(last, abs=1e-12)


def test_constant_has_no_warm_up(tiny_config: Any) -> None:
    assert factors(tiny_config(lr_scheduler_type="constant", warmup_steps=10), 3) == [1, 1, 1]


def test_each_network_has_its_own_rate(tiny_config: Any) -> None:
    networks = nn.ModuleDict({"unet": nn.Linear(2, 2), "text_encoder": nn.Linear(2, 2)})
    optimizer = build_optimizer(networks, tiny_config(text_encoder_learning_rate=1e-5, weight_decay=0.1))
    assert set_learning_rate(optimizer, 0.5) == 5e-4
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-6]
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)
    nn.init.zeros_(networks["text_encoder"].weight)  # which weight decay leaves as they are
    for parameter in networks.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = networks["text_encoder"].weight.abs().max()
    assert moved.item() == pytest.approx(5e-6, rel=0.05)  # Adam's first step is the rate, whatever the gradient
