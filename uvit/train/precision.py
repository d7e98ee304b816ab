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
from uvit.distributed.ops import local_grads, local_tensor
from uvit.train.adamw import FusedAdamW
from uvit.train.muon import Muon


class LossScale:
    """The factor of a float16 loss that keeps small gradients from underflowing (Micikevicius et al. 2018).

    It is halved when a gradient is not finite, and doubled after 2000 steps in a row without. torch's GradScaler looks
    at the gradients of one process; here the caller passes whether those of all processes are finite, so that all
    processes use the same factor.
    """

    INITIAL, GROWTH_INTERVAL = 2.0**16, 2000

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.value = torch.tensor(self.INITIAL if enabled else 1.0, device=device)
        self.num_good_steps = torch.tensor(0, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """`finite`: a flag on the device."""
        if not self.enabled:
            return
        self.num_good_steps += 1
        self.num_good_steps *= finite
        grown = self.num_good_steps == self.GROWTH_INTERVAL
        self.value *= torch.where(finite, 1.0 + grown, 0.5)
        self.num_good_steps *= ~grown

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value.item(), "num_good_steps": self.num_good_steps.item()} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value.fill_(state["scale"])
            self.num_good_steps.fill_(state["num_good_steps"])


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
        self.scale = LossScale(config.fp16, device)

    def autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32 and not self.has_copy
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def cast(self, tensor: Tensor) -> Tensor:
        """An input of `compute_model`, in the dtype that it takes."""
        return tensor.to(self.dtype) if self.has_copy else tensor.float()

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value if self.scale.enabled else loss).backward()

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the last backward of a step: undo the scale of the gradients."""
        if self.scale.enabled:
            torch._foreach_mul_(local_grads(self.master_model.parameters()), 1 / self.scale.value)

    def step(self, optimizer: FusedAdamW | Muon, skipped: Tensor, finite: Tensor) -> None:
        """Update the master model unless the step is skipped, and the loss scale. Both are flags on the device."""
        optimizer.step(skipped=skipped)
        self.scale.update(finite)
        optimizer.zero_grad()
        self.update_compute_model()

    @torch.no_grad()
    def update_compute_model(self) -> None:
        """Copy the values of the master model to `compute_model`, if that is a copy."""
        if self.has_copy:
            copies = [local_tensor(parameter) for parameter in self.compute_model.parameters()]
            torch._foreach_copy_(copies, [local_tensor(parameter) for parameter in self.master_model.parameters()])
