"""What a run will need, counted on the meta device: nothing is computed and no memory is taken."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from uvit.model import UViTT2IModel
from uvit.train.setup import Run, model_config

MIB = 2**20


def describe(run: Run) -> str:
    """Model, FLOPs, memory and epochs of a run, in lines for people."""
    config, features = run.config, run.features
    unet = run.networks["unet"]
    num_unet = sum(p.numel() for p in unet.parameters())
    num_trained = sum(p.numel() for p in run.networks.parameters())
    forward_flops, activation_bytes = measure_forward(run)
    bytes_per_parameter = {"weights": 4, "gradients": 4, "optimizer": 8, "EMA": 4 if run.ema else 0}
    if run.precision.has_copy:
        bytes_per_parameter["low-precision copy and its gradients"] = 4
    memory = {name: size * num_trained for name, size in bytes_per_parameter.items() if size}
    memory["activations"] = activation_bytes
    backward = 3 if config.recompute else 2
    step_flops = (1 + backward) * forward_flops * run.samples_per_step
    steps_per_epoch = features.num_samples / run.samples_per_step
    lines = [
        f"model        {config.uvit_config_file}: {num_unet:,} parameters"
        + (f", and {num_trained - num_unet:,} of the text encoder" if num_trained > num_unet else ""),
        f"work         {forward_flops / 1e9:,.1f} GFLOP a forward pass of one sample, {step_flops / 1e12:,.2f} TFLOP a step",
        f"batch        {config.per_device_train_batch_size} x {config.gradient_accumulation_steps} = {run.samples_per_step} samples",
        f"memory       {sum(memory.values()) / MIB:,.0f} MiB = "
        + " + ".join(f"{name} {size / MIB:,.0f}" for name, size in memory.items()),
        f"data         {features.num_samples:,} samples, {steps_per_epoch:,.1f} steps an epoch",
        f"run          {run.max_steps:,} steps, {run.max_steps / steps_per_epoch:,.1f} epochs, "
        f"{step_flops * run.max_steps:.2e} FLOP",
    ]
    return "\n".join(lines)


def measure_forward(run: Run) -> tuple[int, int]:
    """(FLOPs of a forward pass of one sample, bytes that a batch's forward keeps for its backward) of the U-ViT."""
    unet = run.networks["unet"]
    with torch.device("meta"):
        copy = UViTT2IModel(**model_config(unet)).train()
        channels, height, width = run.features.moments_shape
        batch_size = run.config.per_device_train_batch_size
        latents = torch.empty(batch_size, channels // 2, height, width)
        context = torch.empty(batch_size, unet.config.num_text_tokens, unet.config.clip_dim)
        timesteps = torch.ones(batch_size)
    if run.config.recompute:
        copy.enable_gradient_checkpointing()
    parameters = {id(p) for p in copy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters and (tensor._base is None or id(tensor._base) not in parameters):
            base = tensor if tensor._base is None else tensor._base
            kept[id(base)] = base
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", run.precision.dtype, enabled=run.precision.dtype != torch.float32):
            copy(latents, timesteps, context)
    return counter.get_total_flops() // batch_size, sum(t.numel() * t.element_size() for t in kept.values())
