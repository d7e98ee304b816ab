"""What a run will need, before it starts."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uvit.cost import activation_bytes, count_flops
from uvit.train.setup import Run, model_config

MIB = 2**20


def describe(run: Run) -> str:
    """Model, FLOPs, memory and epochs of a run, in lines for people."""
    config, features = run.config, run.features
    unet = run.networks["unet"]
    num_unet = sum(p.numel() for p in unet.parameters())
    num_trained = sum(p.numel() for p in run.networks.parameters())
    _, height, width = features.moments_shape
    size = (height, width)
    forward_flops, both_flops = count_flops(model_config(unet), size=size)
    if config.recompute:
        both_flops += forward_flops
    frozen = run.frozen_text_encoder
    text_flops = 0 if frozen is None else count_text_flops(frozen, features.num_tokens or 0)
    bytes_per_parameter = {"weights": 4, "gradients": 4, "optimizer": 8, "EMA": 4 if run.ema else 0}
    if run.precision.has_copy:
        bytes_per_parameter["low-precision copy and its gradients"] = 4
    memory = {name: size * num_trained for name, size in bytes_per_parameter.items() if size}
    memory["activations"] = activation_bytes(
        model_config(unet), config.per_device_train_batch_size, size, run.precision.dtype, config.recompute
    )
    if frozen is not None:
        memory["frozen text encoder"] = sum(p.numel() * p.element_size() for p in frozen.parameters())
    step_flops = (both_flops + text_flops) * run.samples_per_step
    steps_per_epoch = features.num_samples / run.samples_per_step
    lines = [
        f"model        {config.uvit_config_file}: {num_unet:,} parameters"
        + (f", and {num_trained - num_unet:,} of the text encoder" if num_trained > num_unet else ""),
        f"work         {forward_flops / 1e9:,.1f} GFLOP a forward pass of one sample, "
        + (f"{text_flops / 1e9:,.1f} of the frozen text encoder, " if frozen is not None else "")
        + f"{step_flops / 1e12:,.2f} TFLOP a step",
        f"batch        {config.per_device_train_batch_size} x {config.gradient_accumulation_steps} = "
        f"{run.samples_per_step} samples",
        f"memory       {sum(memory.values()) / MIB:,.0f} MiB = "
        + " + ".join(f"{name} {size / MIB:,.0f}" for name, size in memory.items()),
        f"data         {features.num_samples:,} samples, {steps_per_epoch:,.1f} steps an epoch",
        *validation_line(run),
        f"run          {run.max_steps:,} steps, {run.max_steps / steps_per_epoch:,.1f} epochs, "
        f"{step_flops * run.max_steps:.2e} FLOP",
    ]
    return "\n".join(lines)


def validation_line(run: Run) -> list[str]:
    if run.validation is None:
        return []
    num_available = run.validation.num_samples
    num_samples = min(run.config.num_validation_samples, num_available)
    return [f"validation   {num_samples:,} of {num_available:,} samples, every {run.config.eval_steps:,} steps"]


def count_text_flops(text_encoder: Any, num_tokens: int) -> int:
    """FLOPs of a caption's way through a text encoder, counted like the U-ViT's."""
    hollow = copy.deepcopy(text_encoder).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hollow(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"))
    return counter.get_total_flops()
