"""What a run will need, before it starts."""

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
    bytes_per_parameter = {"weights": 4, "gradients": 4, "optimizer": 8, "EMA": 4 if run.ema else 0}
    if run.precision.has_copy:
        bytes_per_parameter["low-precision copy and its gradients"] = 4
    memory = {name: size * num_trained for name, size in bytes_per_parameter.items() if size}
    memory["activations"] = activation_bytes(
        model_config(unet), config.per_device_train_batch_size, size, run.precision.dtype, config.recompute
    )
    step_flops = both_flops * run.samples_per_step
    steps_per_epoch = features.num_samples / run.samples_per_step
    lines = [
        f"model        {config.uvit_config_file}: {num_unet:,} parameters"
        + (f", and {num_trained - num_unet:,} of the text encoder" if num_trained > num_unet else ""),
        f"work         {forward_flops / 1e9:,.1f} GFLOP a forward pass of one sample, "
        f"{step_flops / 1e12:,.2f} TFLOP a step",
        f"batch        {config.per_device_train_batch_size} x {config.gradient_accumulation_steps} = "
        f"{run.samples_per_step} samples",
        f"memory       {sum(memory.values()) / MIB:,.0f} MiB = "
        + " + ".join(f"{name} {size / MIB:,.0f}" for name, size in memory.items()),
        f"data         {features.num_samples:,} samples, {steps_per_epoch:,.1f} steps an epoch",
        f"run          {run.max_steps:,} steps, {run.max_steps / steps_per_epoch:,.1f} epochs, "
        f"{step_flops * run.max_steps:.2e} FLOP",
    ]
    return "\n".join(lines)
