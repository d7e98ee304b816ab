"""In which precision to compute: float32, or bfloat16 or float16 in one of two ways.

O1: autocast over float32 weights. O2: a low-precision copy of the networks computes, and its gradients go to the
float32 masters, which the optimizer, the EMA and the checkpoints know alone. float16 scales its loss.
"""

import copy

import torch
from torch import Tensor, nn

from uvit.config.train import TrainConfig


class Precision:
    """`networks` compute; `masters`, float32, are what is trained (the same ones but under O2)."""

    def __init__(self, config: TrainConfig, masters: nn.ModuleDict, device: torch.device):
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
        self.device = device
        self.has_copy = self.dtype != torch.float32 and config.fp16_opt_level == "O2"
        self.masters = masters
        self.networks = copy.deepcopy(masters).to(self.dtype) if self.has_copy else masters
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.fp16)

    def autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32 and not self.has_copy
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def cast(self, tensor: Tensor) -> Tensor:
        """An input of the networks in the type that they take."""
        return tensor.to(self.dtype) if self.has_copy else tensor.float()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def collect_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """After the last backward of a step: the masters' gradients, in float32 and unscaled."""
        if self.has_copy:
            for master, worker in zip(self.masters.parameters(), self.networks.parameters(), strict=True):
                master.grad = None if worker.grad is None else worker.grad.float()
                worker.grad = None
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: bool) -> None:
        """Update the masters, unless the gradients are not finite; a float16 scale then gives way."""
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        if finite:
            self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """The masters' values to the copy that computes."""
        if self.has_copy:
            torch._foreach_copy_(list(self.networks.parameters()), list(self.masters.parameters()))
