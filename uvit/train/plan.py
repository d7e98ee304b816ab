"""What each process of a run holds at the fullest moment of a step, and what it sends to the others in a step.

Shapes alone: no process is started and no memory taken, whatever the number of processes. A step is followed as
`uvit.distributed` lays it out: replicas send their gradients in buckets while the backward goes on, shards are gathered
a block at a time, tensor parallel processes add up what comes out of attention and MLPs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uvit.config.train import TrainConfig
from uvit.cost import hollow_unet, trace_step
from uvit.distributed.mesh import Degrees
from uvit.model import Block, UViTT2IModel

Encode = tuple[nn.Module, Callable[[Tensor], Tensor]]  # a text encoder on the meta device, and what computes with it


@dataclass(frozen=True)
class Plan:
    """In bytes, of the process that has the most."""

    memory: dict[str, int]  # of the device at the fullest moment of a step, by what is there then
    saving: int  # ordinary memory that the first replica's processes copy checkpoints to
    sent: dict[str, int]  # in a step, by what


def make_plan(
    config: TrainConfig,
    model_config: dict[str, Any],
    size: tuple[int, int],
    text_encoder: Encode | None = None,
    frozen_bytes: int = 0,
) -> Plan:
    """size: of the latents. `text_encoder`: that is trained; it is changed. `frozen_bytes`: of one that is not."""
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    compute, autocast = dtypes(config)
    width, has_copy = compute.itemsize, compute != torch.float32
    unet = hollow_unet(model_config, degrees.tp)
    units = units_of(unet, text_encoder[0] if text_encoder else None)
    whole = sum(numel(unit) for unit in units)
    held = sum(numel(unit, degrees.shard) for unit in units)

    always = {"weights": 4 * held, "optimizer": 8 * held, "EMA": 4 * held if config.use_ema else 0}
    saving = sum(always.values())
    always |= {"low-precision copy": width * held if has_copy else 0, "frozen text encoder": frozen_bytes}
    trace = trace_step(
        model_config,
        config.per_device_train_batch_size,
        size,
        dtype=compute,
        autocast=autocast,
        recompute=config.recompute,
        tp=degrees.tp,
        encode=text_encoder,
    )
    accumulates = config.gradient_accumulation_steps > 1
    if degrees.shard > 1:
        # Until the last microbatch a process keeps the gradients whole.
        before, stay, sent = (width * whole, 0.0, 0.0) if accumulates else (0, held / whole, 0.0)
    else:
        before, stay, sent = width * whole if accumulates else 0, 0.0 if accumulates else 1.0, float(degrees.dp > 1)
    activations, gradients = trace.fullest(stay + sent)
    in_backward = {
        "activations": activations,
        "gradients": before + round(stay * gradients),
        "gradients being sent": round(sent * gradients),
        "gathered blocks": gathered_bytes(units, width) if degrees.shard > 1 else 0,
    }
    in_update = {"gradients": 4 * held}
    fullest = max(in_backward, in_update, key=lambda part: sum(part.values()))
    memory = {name: num_bytes for name, num_bytes in (always | fullest).items() if num_bytes}
    return Plan(memory, saving, sent_bytes(config, degrees, unet, size, width * whole, width * held))


def dtypes(config: TrainConfig) -> tuple[torch.dtype, torch.dtype]:
    """-> (of the weights that compute, of autocast; float32: none)."""
    low = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    return (low, torch.float32) if config.fp16_opt_level == "O2" else (torch.float32, low)


# What there is


def units_of(unet: UViTT2IModel, text_encoder: nn.Module | None) -> list[list[Tensor]]:
    """Parameters that are gathered together: of each block, of the rest of the U-ViT, of the text encoder."""
    blocks = [list(block.parameters()) for block in blocks_of(unet)]
    in_blocks = {parameter for block in blocks for parameter in block}
    rest = [parameter for parameter in unet.parameters() if parameter not in in_blocks]
    return [*blocks, rest, *([list(text_encoder.parameters())] if text_encoder else [])]


def blocks_of(unet: UViTT2IModel) -> list[Block]:
    return [*unet.in_blocks, unet.mid_block, *unet.out_blocks]


def numel(parameters: Iterable[Tensor], shard: int = 1) -> int:
    """Elements that the first of `shard` processes holds, cut along a dim that divides evenly or else the first."""
    total = 0
    for parameter in parameters:
        even = any(length % shard == 0 for length in parameter.shape)
        first = parameter.shape[0]
        total += parameter.numel() // shard if even else parameter.numel() // first * math.ceil(first / shard)
    return total


def gathered_bytes(units: list[list[Tensor]], width: int) -> int:
    """Of a block at work and the next one, with the gradients of the first, and all outside of blocks with its own."""
    *blocks, last = (width * numel(unit) for unit in units)
    return 2 * last + 4 * max(blocks)


# What is sent


def sent_bytes(
    config: TrainConfig, degrees: Degrees, unet: UViTT2IModel, size: tuple[int, int], whole: int, held: int
) -> dict[str, int]:
    """By rings: of n processes each sends (n - 1) / n of what is gathered or scattered, and twice that of a sum.

    `whole`, `held`: bytes of the weights that compute, of which a process holds a shard.
    """
    dp, shard, tp = degrees.dp, degrees.shard, degrees.tp
    num_microbatches = config.gradient_accumulation_steps
    sent = {
        "gradients between replicas": 2 * (dp - 1) / dp * held,
        "weights between shards": num_microbatches * 2 * (shard - 1) / shard * whole,
        "gradients between shards": (shard - 1) / shard * whole,
        "activations within blocks": num_microbatches * 2 * (tp - 1) / tp * summed_bytes(config, unet, size),
    }
    return {name: round(num_bytes) for name, num_bytes in sent.items() if num_bytes}


def summed_bytes(config: TrainConfig, unet: UViTT2IModel, size: tuple[int, int]) -> int:
    """Of the activations and their gradients that tensor parallel processes sum in a microbatch.

    Forward: what comes out of attention and MLP. Backward: the gradients of what goes into them.
    """
    compute, autocast = dtypes(config)
    forward_width, backward_width = min(compute.itemsize, autocast.itemsize), compute.itemsize
    patches = size[0] * size[1] // unet.patch_size**2
    tokens = unet.num_extra_tokens + patches
    blocks = blocks_of(unet)
    num_outputs = [tokens] * (len(blocks) - 1) + [patches]  # of the last block only the patches are wanted
    # A block is recomputed up to the last thing that its backward needs: not to what comes out of its MLP.
    forward = sum((3 if config.recompute else 2) * outputs for outputs in num_outputs)
    backward = sum(tokens + outputs for outputs in num_outputs)
    dim = blocks[0].mlp.fc2.out_features
    return config.per_device_train_batch_size * dim * (forward_width * forward + backward_width * backward)
