"""An exponential moving average of a model's parameters, in float32."""

import copy

import torch
from torch import nn

from uvit.distributed.ops import local


class EMA:
    """Keeps `model`, a frozen float32 copy whose parameters follow: ema = decay ema + (1 - decay) parameter."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Once an optimizer step."""
        averages = [local(average) for average in self.model.parameters()]
        parameters = [local(parameter) for parameter in model.parameters()]
        torch._foreach_lerp_(averages, parameters, 1 - self.decay)


@torch.no_grad()
def bits(model: nn.Module) -> int:
    """A sum of the float32 parameters' bits, of this process's parts: another one wherever anything moved."""
    sums = [local(parameter).view(torch.int32).sum(dtype=torch.int64) for parameter in model.parameters()]
    return int(torch.stack(sums).sum().item())
