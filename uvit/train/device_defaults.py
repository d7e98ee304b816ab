"""The flags of `uvit train` whose defaults depend on the device: what is fast on a GPU, and as published on a CPU."""

import dataclasses

import torch
from torch.utils._triton import has_triton

from uvit.config.train import TrainConfig
from uvit.device import has_bf16

COMPILED_FROM = 1000  # steps: in a shorter run, compiling takes longer than it saves


def with_device_defaults(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The same with --bf16 and --compile decided."""
    on_gpu = device.type == "cuda"
    bf16, compiles = config.bf16, config.compile
    if bf16 is None:
        bf16 = has_bf16(device) and not config.fp16
    if compiles is None:
        is_long = config.max_steps >= COMPILED_FROM or config.num_train_epochs is not None
        compiles = on_gpu and is_long and config.align == "none" and has_triton()
    return dataclasses.replace(config, bf16=bf16, compile=compiles)


def describe_speed(config: TrainConfig) -> str:
    """How a GPU computes, and the flags that choose otherwise. `config`: with the defaults decided."""
    low = "bfloat16" if config.bf16 else "float16" if config.fp16 else None
    single = "TF32" if config.tf32 else "float32"
    precision = f"{low}, and {single} for what stays float32" if low else single
    compiled = "compiled block by block" if config.compile else "not compiled"
    return f"the GPU computes in {precision}; {compiled} (--bf16, --tf32 and --compile choose)"
