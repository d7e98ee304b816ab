"""FusedAdamW: torch's AdamW to the bit, and no update where the flag says so."""

from typing import Any

import torch
from torch import nn

from uvit.train import adamw as module
from uvit.train.adamw import FusedAdamW
from uvit.train.ema import EMA
from uvit.train.muon import Muon

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.8), "weight_decay": 0.03}


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2))
    return [whole, *(type(whole)(*(nn.Linear(a, b) for a, b in ((5, 7), (7, 3), (2, 2)))) for _ in range(count - 1))]


def set_grads(network: nn.Module, step: int) -> None:
    """Of all but the last layer."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in network.named_parameters():
        parameter.grad = None if name.startswith("2") else torch.randn(parameter.shape, generator=generator)


def test_it_is_torchs_adamw_to_the_bit() -> None:
    ours, theirs = networks(2)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": list(layer.parameters())} for layer in ours]
    optimizers = FusedAdamW(groups, **SETTINGS), torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    for step in range(4):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_grads(network, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        one, other = (optimizer.state[p] for optimizer, p in zip(optimizers, (a, b), strict=True))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> list[torch.Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in [*network.parameters(), *ema.model.parameters(), *states]]


def test_a_flag_that_only_the_device_knows_masks_the_update(monkeypatch: Any) -> None:
    """As on a GPU, where the host does not wait for it: AdamW, Muon and the EMA weights are those of steps that the
    host skips, to the bit.
    """

    def train(masked: bool) -> list[torch.Tensor]:
        network = networks(1)[0]
        weights, rest = [[p for p in network.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False)]
        adamw = FusedAdamW([{"params": rest}], **SETTINGS)
        groups = [{"params": weights, "num_matrices": 1, "lr": 1e-2}]
        optimizer, ema = Muon(groups, adamw, 0.03, torch.float32), EMA(network, 0.9)
        if masked:
            for name in ("adamw", "muon", "ema"):
                monkeypatch.setattr(f"uvit.train.{name}.is_known", lambda _: False)
        for step, skips in enumerate([False, True, False, True, False]):
            set_grads(network, step)
            if skips:
                next(network.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
            optimizer.step(skipped=torch.tensor(skips))
            ema.update(network, step + 1, torch.tensor(skips))
        return state_of(network, optimizer, ema)

    known, masked = train(False), train(True)
    assert len(known) == len(masked) and all(torch.equal(a, b) for a, b in zip(known, masked, strict=True))
    assert all(tensor.isfinite().all() for tensor in masked)


def test_the_lists_follow_the_parameters_that_have_gradients() -> None:
    network = networks(1)[0]
    optimizer = FusedAdamW([{"params": list(network.parameters())}], **SETTINGS)
    set_grads(network, 0)
    optimizer.step()
    before = [parameter.clone() for parameter in network[2].parameters()]  # type: ignore[index]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network[2].parameters(), strict=True))  # type: ignore[index]
    assert optimizer.state[network[2].weight]["step"] == 1 and optimizer.state[network[0].weight]["step"] == 2  # type: ignore[index]
    assert module.new_adamw_state(network[0].weight)["step"] == 0  # type: ignore[index]
