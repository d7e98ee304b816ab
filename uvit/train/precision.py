"""The precision of training: float32, or bfloat16 or float16 at one of two levels.

O1: autocast over float32 weights. O2: a low-precision copy of the model computes, and its gradients go to the float32
master model, where they are added up (see `GradientAverage`). The optimizer, the EMA and the checkpoints
use the master model only. float16 scales the loss.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from uvit.config.train import TrainConfig
from uvit.distributed.ops import local_tensor


class LossScale:
    """The factor of a float16 loss that keeps small gradients from underflowing (Micikevicius et al. 2018).

    It is halved when a gradient is not finite, and doubled after 2000 steps in a row without. torch's GradScaler looks
    at the gradients of one process; here the caller passes whether those of all processes are finite, so that all
    processes use the same factor.
    """

    INITIAL, GROWTH_INTERVAL = 2.0**16, 2000

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.value = self.INITIAL if enabled else 1.0
        self.num_good_steps = 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.num_good_steps = self.num_good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.num_good_steps == self.GROWTH_INTERVAL:
            self.value, self.num_good_steps = 2 * self.value, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "num_good_steps": self.num_good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value, self.num_good_steps = state["scale"], state["num_good_steps"]


class Precision:
    """`master_model`, in float32, is trained. `compute_model` computes.

    At O2 that is a low-precision copy, and otherwise the same model.
    """

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
        """An input of `compute_model`, in the dtype that it takes."""
        return tensor.to(self.dtype) if self.has_copy else tensor.float()

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value).backward()

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the last backward of a step: undo the scale of the gradients."""
        if self.scale.enabled:
            grads = [
                local_tensor(parameter.grad)
                for parameter in self.master_model.parameters()
                if parameter.grad is not None
            ]
            torch._foreach_mul_(grads, 1 / self.scale.value)

    def step(self, optimizer: torch.optim.Optimizer, update: bool, finite: bool) -> None:
        """Update the master model if `update`, and the loss scale according to `finite`."""
        if update:
            optimizer.step()
        self.scale.update(finite)
        optimizer.zero_grad()
        if update:
            self.update_compute_model()

    @torch.no_grad()
    def update_compute_model(self) -> None:
        """Copy the values of the master model to `compute_model`, if that is a copy."""
        if self.has_copy:
            copies = [local_tensor(parameter) for parameter in self.compute_model.parameters()]
            torch._foreach_copy_(copies, [local_tensor(parameter) for parameter in self.master_model.parameters()])
