"""The exponential moving average (EMA) of the weights."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from uvit.distributed.ops import local_tensor


class EMA:
    """Keeps `model`, a frozen float32 copy: ema = decay * ema + (1 - decay) * parameter after each step.

    With `update_steps` above 1 it looks at the weights after each `update_steps`-th step only, with the decay of so
    many steps. An update reads and writes as many bytes as two fifths of AdamW's.
    """

    def __init__(self, model: nn.Module, decay: float, update_steps: int = 1):
        self.decay, self.update_steps = decay, update_steps
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None  # the memory of the averages, and of the weights

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: bool = False) -> None:
        """Call this after each optimizer step, with the same model.

        Args:
            step: how many steps there were.
            skipped: whether the last one left the weights as they were. By itself it does not count.
        """
        if step % self.update_steps or (skipped and self.update_steps == 1):
            return
        if self._pairs is None:  # once: at the first update, the models have their layout
            self._pairs = local_parameters(self.model), local_parameters(model)
        torch._foreach_lerp_(*self._pairs, 1 - self.decay**self.update_steps)


def local_parameters(model: nn.Module) -> list[Tensor]:
    """The local tensor of each parameter. A list takes about a millisecond for 166 parameters."""
    return [local_tensor(parameter) for parameter in model.parameters()]


@torch.no_grad()
def checksum(model: nn.Module) -> int:
    """Sum the bits of the float32 parameters of this process. It changes when a parameter changes."""
    parameters = local_parameters(model)
    if all(local.is_cpu for local in parameters):
        return sum(map(_sum_of_bits, parameters))
    sums = [local.view(torch.int32).sum(dtype=torch.int64) for local in parameters]
    return int(torch.stack(sums).sum().item())


def _sum_of_bits(values: Tensor) -> int:
    """With NumPy: 64 bits at a time, and in this thread, so that no other program on the cores delays it."""
    flat = values.reshape(-1).numpy()
    even = flat.size // 2 * 2
    return int(flat[:even].view(np.int64).sum()) + int(flat[even:].view(np.int32).sum())
