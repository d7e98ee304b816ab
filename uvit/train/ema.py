"""The exponential moving average (EMA) of the weights, and power-function averages of several lengths."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from uvit.checkpoint.averages import Snapshot, decay_of, write_snapshot
from uvit.checkpoint.layout import to_checkpoint_layout
from uvit.config.train import TrainConfig
from uvit.distributed.mesh import World
from uvit.distributed.ops import is_known, local_tensor, on_main, whole_tensor

EMA_SHARE = 0.05  # of the run's steps, which the EMA weights average over


class EMA:
    """Keeps `model`, a frozen float32 copy: ema = decay * ema + (1 - decay) * parameter after each step.

    With `update_steps` above 1 it looks at the weights after each `update_steps`-th step only, with the decay of so
    many steps. An update reads and writes as many bytes as two fifths of AdamW's.

    With `lengths` it keeps a power-function average of each (`uvit.checkpoint.averages`). `model` is the first.
    """

    def __init__(self, model: nn.Module, decay: float, update_steps: int = 1, lengths: Sequence[float] = ()):
        self.decay, self.update_steps, self.lengths = decay, update_steps, tuple(lengths)
        self.models = [copy.deepcopy(model).float().eval().requires_grad_(False) for _ in self.lengths or [None]]
        self._weights: list[Tensor] = []  # the memory of the weights, and of each of the averages
        self._averages: list[list[Tensor]] = []

    @property
    def model(self) -> nn.Module:
        return self.models[0]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: Tensor | None = None) -> None:
        """Call this after each optimizer step, with the same model.

        Args:
            step: how many steps there were.
            skipped: a flag on the device: whether the last one left the weights as they were. With a constant decay, it
                does not count then.
        """
        if self.update_steps > 1 or self.lengths:
            skipped = None  # such an update counts all steps
        elif skipped is not None and is_known(skipped):
            if skipped:
                return
            skipped = None
        if step % self.update_steps:
            return
        if not self._weights:  # once: at the first update, the models have their layout
            self._weights, self._averages = local_parameters(model), list(map(local_parameters, self.models))
        decays = [decay_of(length, step, self.update_steps) for length in self.lengths]
        for averages, decay in zip(self._averages, decays or [self.decay**self.update_steps], strict=True):
            if skipped is None:
                torch._foreach_lerp_(averages, self._weights, 1 - decay)
            else:
                share = torch.where(skipped, 0.0, 1 - decay)
                torch._foreach_lerp_(averages, self._weights, [share] * len(averages))

    def further_tensors(self) -> dict[str, Tensor]:
        """The tensors of all averages but the first, named `0.1/unet.pos_embed` and so on."""
        pairs = zip(self.lengths[1:], self.models[1:], strict=True)
        return {f"{length:g}/{name}": tensor for length, model in pairs for name, tensor in model.state_dict().items()}

    def write_snapshots(self, run: Path, step: int, world: World) -> None:
        """Write all averages after `step` steps. All processes call this together; the main one writes."""
        for length, model in zip(self.lengths, self.models, strict=True):
            tensors = {}
            for name, tensor in to_checkpoint_layout(model.state_dict(), world).items():
                whole = whole_tensor(local_tensor(tensor), tensor)
                if world.is_main:
                    tensors[name] = whole.to("cpu", copy=True).contiguous()
            on_main(lambda length=length, found=tensors: write_snapshot(run, Snapshot(step, length), found), world)  # type: ignore[misc]


def ema_decay(config: TrainConfig, num_steps: int) -> float:
    """The decay of the EMA weights in a run of so many steps: --ema_decay, or its default.

    The average is over 1 / (1 - decay) steps. A twentieth of the run is as good as the best on the built-in shapes
    (docs/ablations.md). 0.9999 is the published decay, for a million steps.
    """
    if config.ema_decay is not None:
        return config.ema_decay
    return min(0.9999, max(0.0, 1 - 1 / (EMA_SHARE * num_steps)))


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
