"""In which precision to compute: float32, or bfloat16 or float16 in one of two ways.

O1: autocast over float32 weights. O2: a low-precision copy of the networks computes, and its gradients go to the
float32 masters, which the optimizer, the EMA and the checkpoints know alone. float16 scales its loss.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from uvit.config.train import TrainConfig
from uvit.distributed.ops import local_tensor


class LossScale:
    """What a float16 loss is multiplied with, so that its small gradients do not vanish (Micikevicius et al. 2018).

    Halved where a gradient is not finite, doubled after 2000 steps without. Unlike torch's GradScaler it is told
    whether all gradients of all processes are finite, so that all scale alike.
    """

    FIRST, MOST_STEPS = 2.0**16, 2000

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.value = self.FIRST if enabled else 1.0
        self.num_good_steps = 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.num_good_steps = self.num_good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.num_good_steps == self.MOST_STEPS:
            self.value, self.num_good_steps = 2 * self.value, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "num_good_steps": self.num_good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value, self.num_good_steps = state["scale"], state["num_good_steps"]


class Precision:
    """`networks` compute; `masters`, float32, are what is trained (the same ones but under O2)."""

    def __init__(self, config: TrainConfig, master_model: nn.ModuleDict, device: torch.device):
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
        self.device = device
        self.has_copy = self.dtype != torch.float32 and config.fp16_opt_level == "O2"
        self.master_model = master_model
        self.compute_model = copy.deepcopy(master_model).to(self.dtype) if self.has_copy else master_model
        self.scale = LossScale(enabled=config.fp16)

    def autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32 and not self.has_copy
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def cast(self, tensor: Tensor) -> Tensor:
        """An input of the networks in the type that they take."""
        return tensor.to(self.dtype) if self.has_copy else tensor.float()

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value).backward()

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the last backward of a step: the masters' gradients, in float32 and unscaled."""
        if self.has_copy:
            for master, worker in zip(self.master_model.parameters(), self.compute_model.parameters(), strict=True):
                master.grad = None if worker.grad is None else worker.grad.float()
                worker.grad = None
        if self.scale.enabled:
            grads = [
                local_tensor(parameter.grad)
                for parameter in self.master_model.parameters()
                if parameter.grad is not None
            ]
            torch._foreach_mul_(grads, 1 / self.scale.value)

    def step(self, optimizer: torch.optim.Optimizer, update: bool, finite: bool) -> None:
        """Update the masters, or not; a float16 scale gives way where the gradients are not finite."""
        if update:
            optimizer.step()
        self.scale.update(finite)
        optimizer.zero_grad()
        if update:
            self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """The masters' values to the copy that computes."""
        if self.has_copy:
            copies = [local_tensor(parameter) for parameter in self.compute_model.parameters()]
            torch._foreach_copy_(copies, [local_tensor(parameter) for parameter in self.master_model.parameters()])
