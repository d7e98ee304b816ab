"""The optimizer and its learning rate."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uvit.config.train import TrainConfig
from uvit.distributed.mesh import World
from uvit.distributed.ops import fused_groups
from uvit.errors import UserError
from uvit.train.adamw import FusedAdamW, new_adamw_state
from uvit.train.ema import EMA
from uvit.train.muon import Muon, block_matrices

# AdamW and Muon


def build_optimizer(model: nn.ModuleDict, config: TrainConfig, world: World | None = None) -> FusedAdamW | Muon:
    """AdamW over the U-ViT, a trained text encoder and a projector, each with its peak learning rate (`peak_lr`).

    With `--optim muon`, Muon takes the matrices of their blocks. Its rate is scaled with the network's. The processes
    of `world` share its work.
    """
    rates = {"unet": config.unet_learning_rate, "text_encoder": config.text_encoder_learning_rate}
    groups: list[dict[str, Any]] = []
    matrix_groups: list[dict[str, Any]] = []
    for name, network in model.items():
        own = rates.get(name)
        rate = config.learning_rate if own is None else own
        matrices = block_matrices(network) if config.optim == "muon" else {}
        others = [parameter for parameter in network.parameters() if parameter not in matrices]
        groups += [{"params": group, "lr": rate, "peak_lr": rate} for group in fused_groups(others)]
        for count in sorted(set(matrices.values())):
            params = [parameter for parameter, number in matrices.items() if number == count]
            peak = config.peak_muon_learning_rate * rate / config.learning_rate
            matrix_groups.append({"params": params, "num_matrices": count, "lr": peak, "peak_lr": peak})
    adamw = FusedAdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    if config.optim == "adamw":
        return adamw
    if not matrix_groups:
        raise UserError("--optim muon: the networks have no blocks with linear layers; use --optim adamw")
    return Muon(matrix_groups, adamw, config.weight_decay, iteration_dtype(config), world)


def iteration_dtype(config: TrainConfig) -> torch.dtype:
    """In which Muon makes matrices orthogonal."""
    return torch.bfloat16 if config.bf16 or config.fp16 else torch.float32


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step starts from, in the parameter's layout.

    A checkpoint can then be loaded into it, and every checkpoint has the state of all parameters.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            if "num_matrices" in group:  # Muon's
                optimizer.state[parameter] = {"momentum": torch.zeros_like(parameter)}
            else:
                optimizer.state[parameter] = new_adamw_state(parameter)


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """The tensors of the optimizer's state (not copies), named `exp_avg/unet.pos_embed` and so on."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, dict[str, Tensor]]:
    """All tensors that change from step to step, by the names of a checkpoint's files."""
    init_optimizer_state(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {"weights": model.state_dict(), "optimizer": flatten_optimizer(optimizer, names)}
    averages = {"ema": ema.model.state_dict(), "ema_lengths": ema.further_tensors()} if ema else {}
    return state | {group: tensors for group, tensors in averages.items() if tensors}


# The learning rate


def learning_rate_factor(step: int, config: TrainConfig, max_steps: int, schedule_steps: int | None = None) -> float:
    """The learning rate at optimizer step `step`, counted from 0, as a fraction of the peak learning rate.

    With a warm-up, the first update has rate 0. This is a pure function, so resuming needs no scheduler state.

    Args:
        schedule_steps: how many steps the run would have if all of them had the batch of now. The decay follows what is
            left of those, so that another batch of a resumed run does not change it. --warmup_steps counts steps of any
            batch.
    """
    kind = config.lr_scheduler_type
    if kind == "constant":
        return 1.0
    num_steps = schedule_steps or max_steps
    position = num_steps - max_steps + step
    num_warmup = num_warmup_steps(config, num_steps)
    warmed_up = step if config.warmup_steps else position
    if warmed_up < num_warmup:
        return warmed_up / num_warmup
    lowest = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    progress = (position - num_warmup) / max(1, num_steps - num_warmup)
    return max(lowest, _decay(kind, min(1.0, max(0.0, progress)), config))


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """The first step at the peak learning rate, counted from 0."""
    return max(1, config.warmup_steps or math.ceil(config.warmup_ratio * num_steps))


def _decay(kind: str, progress: float, config: TrainConfig) -> float:
    """The factor at `progress` (0..1) of the steps after the warm-up."""
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return 0.5 * (1 + math.cos(2 * math.pi * (config.num_cycles or 0.5) * progress))
    if kind == "cosine_with_restarts":
        return 0.5 * (1 + math.cos(math.pi * (((config.num_cycles or 1) * progress) % 1))) if progress < 1 else 0.0
    if kind == "polynomial":
        end = config.lr_end / config.learning_rate if config.learning_rate else 0.0
        return end + (1 - end) * (1 - progress) ** config.power
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Returns the learning rate of the U-ViT, which is that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def muon_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Muon's learning rate of the U-ViT, if Muon trains it."""
    return next((group["lr"] for group in optimizer.param_groups if "num_matrices" in group), None)
