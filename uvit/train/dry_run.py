"""`uvit train --dry_run`: the model, its FLOPs, and the memory and traffic of each process, before a run starts.

The run is set up as for training, on the meta device: its networks have shapes and no content. So any number of
processes is planned without starting one. A step is followed as `uvit.distributed` lays it out: replicas send their
gradients in buckets during the backward pass, sharded processes gather one block at a time, and tensor parallel
processes sum the outputs of attention and MLPs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from uvit.config.train import TrainConfig
from uvit.device import pick_device
from uvit.distributed.mesh import Degrees, World
from uvit.errors import UserError
from uvit.model import UViTT2IModel, blocks_in_order
from uvit.train.alignment import Projector, empty_targets
from uvit.train.device_defaults import with_device_defaults
from uvit.train.memory import trace_muon, trace_step
from uvit.train.muon import block_matrices
from uvit.train.optimizer import iteration_dtype
from uvit.train.profiling import count_flops, meta_unet
from uvit.train.schedule import run_warnings
from uvit.train.setup import Run, build_run
from uvit.weights.unet import model_config

MIB = 2**20
DRIVER_BYTES, ALLOCATOR_OVERHEAD = 2**30, 1.05  # of a GPU, beside what a plan counts; not measured


# What is printed


def describe_plan(config: TrainConfig) -> str:
    """Model, FLOPs, memory, traffic and epochs of a run, as text. Raises the UserErrors of `build_run`."""
    run = build_meta_run(config)
    features, degrees, frozen = run.features, run.world.degrees, run.frozen_text_encoder
    unet, text_encoder = run.master_model["unet"], trained_text_encoder(run)
    num_unet, num_text = (num_parameters(network) for network in (unet, text_encoder))
    num_data_ranks, samples = run.world.num_data_ranks, run.samples_per_step
    steps_per_epoch = features.num_samples / samples
    forward_flops, both_flops = count_flops(model_config(unet), size=features.latents_shape[1:])  # type: ignore[arg-type]
    if config.recompute:
        both_flops += forward_flops
    text_flops = 0 if frozen is None else count_text_flops(frozen, features.num_tokens or 0)
    projector = projector_of(run)
    align_flops = 0 if projector is None else 3 * count_projector_flops(projector, unet, features.latents_shape[1:])
    step_flops = (both_flops + text_flops + align_flops) * samples
    ranks = f" x {num_data_ranks} data ranks" if num_data_ranks > 1 else ""
    lines = [
        f"model        {config.pretrained_model_name_or_path or config.uvit_config_file}: {num_unet:,} parameters"
        + (f", and {num_text:,} of the text encoder" if num_text else "")
        + (f", and {num_parameters(projector):,} of the projector of --align {config.align}" if projector else ""),
        f"work         {forward_flops / 1e9:,.1f} GFLOP per forward pass of one sample, "
        + (f"{text_flops / 1e9:,.1f} of the frozen text encoder, " if frozen is not None else "")
        + f"{step_flops / 1e12:,.2f} TFLOP per step",
        f"batch        {config.per_device_train_batch_size} x {config.gradient_accumulation_steps}{ranks} = "
        f"{samples:,} samples",
        *plan_lines(plan_of_run(run), degrees),
        f"data         {features.num_samples:,} samples, {steps_per_epoch:,.1f} steps per epoch",
        *validation_line(run),
        f"run          {run.max_steps:,} steps, {run.max_steps / steps_per_epoch:,.1f} epochs, "
        f"{step_flops * run.max_steps:.2e} FLOP{describe_ema(run)}",
        *(f"warning: {sentence}" for sentence in run_warnings(run)),
    ]
    return "\n".join(lines)


def describe_ema(run: Run) -> str:
    if not run.ema:
        return ""
    if run.ema.lengths:
        return f", EMA weights over {', '.join(f'{length:g}' for length in run.ema.lengths)} of the run"
    return f", EMA weights over {1 / (1 - run.ema.decay):,.0f} steps"


def build_meta_run(config: TrainConfig) -> Run:
    """The run as its first process would build it, on the meta device. Other processes are not needed."""
    config = with_device_defaults(config, pick_device(config.device))
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    world = World(0, degrees.product, degrees, torch.device("meta"), None)
    return build_run(config, Path(config.output_dir), world)


# What fits on a GPU


def does_not_fit(config: TrainConfig, memory: str, num_bytes: int) -> UserError:
    """The error of a run that needs more than the `num_bytes` of a GPU, which `memory` names: with flags that fit."""
    what = f"--per_device_train_batch_size {config.per_device_train_batch_size}: needs more than the {memory}"
    fitting = fitting_config(config, num_bytes)
    if fitting is None:
        return UserError(
            f"{what}, and so does a batch of 1 with --recompute; use a larger GPU, or several with "
            "--sharding_parallel_degree"
        )
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "recompute")
    flags = " ".join(f"--{name} {getattr(fitting, name)}" for name in names if getattr(fitting, name) is not False)
    planned = sum(plan_of_run(build_meta_run(fitting)).memory.values())
    return UserError(f"{what}; run the same command with {flags}, which the plan puts at {in_mib(planned)} MiB")


def fitting_config(config: TrainConfig, num_bytes: int) -> TrainConfig | None:
    """The same batch of a step in more and smaller microbatches, the fewest that fit; if none do, with --recompute.

    `num_bytes`: of a GPU, all of them. Without the plan's help this config did not fit, so it is not an answer itself.
    """
    usable = (num_bytes - DRIVER_BYTES) / ALLOCATOR_OVERHEAD
    size = config.per_device_train_batch_size
    run = build_meta_run(config)
    for recompute in dict.fromkeys([config.recompute, True]):
        for parts in range(1, size + 1):
            if size % parts or (parts == 1 and recompute == config.recompute):
                continue
            smaller = replace(
                config,
                per_device_train_batch_size=size // parts,
                gradient_accumulation_steps=config.gradient_accumulation_steps * parts,
                recompute=recompute,
            )
            if sum(plan_of_run(replace(run, config=smaller)).memory.values()) <= usable:
                return smaller
    return None


def trained_text_encoder(run: Run) -> nn.Module | None:
    return dict(run.master_model.items()).get("text_encoder")


def projector_of(run: Run) -> Projector | None:
    return dict(run.master_model.items()).get("projector")  # type: ignore[return-value]


def plan_lines(plan: "ResourcePlan", degrees: Degrees) -> list[str]:
    each = " per process" if degrees.product > 1 else ""
    copies = " in each process of one replica" if degrees.dp > 1 else each
    lines = [
        f"memory       {in_mib(sum(plan.memory.values()))} MiB{each} at the peak of a step = {listed(plan.memory)}",
        f"             and {in_mib(plan.saving)} MiB of CPU memory{copies} to copy checkpoints to",
    ]
    if not each:
        return lines
    traffic = f"traffic      {in_mib(sum(plan.sent.values()))} MiB sent{each} and step = {listed(plan.sent)}"
    return [f"processes    {degrees}", *lines, traffic]


def listed(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {in_mib(num_bytes)}" for name, num_bytes in parts.items())


def in_mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f}"


def num_parameters(network: nn.Module | None) -> int:
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def validation_line(run: Run) -> list[str]:
    if run.validation is None:
        return []
    num_available = run.validation.num_samples
    num_samples = min(run.config.num_validation_samples, num_available)
    return [f"validation   {num_samples:,} of {num_available:,} samples, every {run.config.eval_steps:,} steps"]


def count_text_flops(text_encoder: Any, num_tokens: int) -> int:
    """FLOPs of encoding one caption with a text encoder on the meta device, counted like the U-ViT's."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        text_encoder(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"))
    return counter.get_total_flops()


def count_projector_flops(projector: Projector, unet: Any, size: tuple[int, ...]) -> int:
    """FLOPs of predicting the targets of one sample, for latents of this size."""
    with torch.device("meta"):
        targets = empty_targets(unet, projector, torch.empty(1, unet.config.in_channels, *size))
        tokens = torch.empty(1, targets[0, 0].numel(), unet.norm.weight.shape[0])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(tokens, targets)
    return counter.get_total_flops()


# The plan


@dataclass(frozen=True)
class ResourcePlan:
    """In bytes, of the process that needs most."""

    memory: dict[str, int]  # of the device, at the peak of a step, by what it holds
    saving: int  # main memory that the processes of the first replica copy a checkpoint to
    sent: dict[str, int]  # in a step, by what is sent


def plan_of_run(run: Run) -> ResourcePlan:
    """`run`: on the meta device."""
    return make_plan(
        run.config,
        model_config(run.master_model["unet"]),
        run.features.latents_shape[1:],  # type: ignore[arg-type]
        trained_text_encoder(run),
        run.pad_token_id,
        frozen_bytes=sum(parameter.nbytes for parameter in run.frozen_text_encoder.parameters())
        if run.frozen_text_encoder is not None
        else 0,
        projector=projector_of(run),
    )


def make_plan(
    config: TrainConfig,
    model_config: dict[str, Any],
    size: tuple[int, int],
    text_encoder: nn.Module | None = None,
    pad_token_id: int = 0,
    frozen_bytes: int = 0,
    projector: Projector | None = None,
) -> ResourcePlan:
    """What a run needs.

    Args:
        size: height and width of the latents.
        text_encoder: on the meta device, if it is trained along with the U-ViT.
        frozen_bytes: size of a text encoder that is not trained.
        projector: on the meta device, of --align.
    """
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    compute, autocast = dtypes(config)
    width, has_copy = compute.itemsize, compute != torch.float32
    unet = meta_unet(model_config, degrees.tp)
    units = gather_units(unet, text_encoder, projector)
    num_all = sum(num_local_elements(unit) for unit in units)
    num_local = sum(num_local_elements(unit, degrees.shard) for unit in units)

    matrices: list[Tensor] = []
    muon_bytes = muon_sent = 0  # what their update takes and sends
    if config.optim == "muon":
        networks: list[nn.Module] = [meta_unet(model_config), *([text_encoder] if text_encoder else [])]
        matrices = [*block_matrices(unet), *(block_matrices(text_encoder) if text_encoder else [])]
        muon_bytes, muon_sent = trace_muon(networks, iteration_dtype(config), degrees.product)
    always = {
        "weights": 4 * num_local,
        "optimizer": 8 * num_local - 4 * num_local_elements(matrices, degrees.shard),
        "EMA": 4 * num_local * (len(config.ema_lengths) or 1) if config.use_ema else 0,
    }
    saving = sum(always.values())
    always |= {"low-precision copy": width * num_local if has_copy else 0, "frozen text encoder": frozen_bytes}
    trace = trace_step(
        model_config,
        config.per_device_train_batch_size,
        size,
        dtype=compute,
        autocast=autocast,
        recompute=config.recompute,
        tp=degrees.tp,
        text_encoder=text_encoder,
        pad_token_id=pad_token_id,
        projector=projector,
        align_block=config.align_block if projector else 1,
        fused_attention=None if config.device == "cpu" else True,
    )
    accumulates = config.gradient_accumulation_steps > 1
    earlier = 4 * num_all if accumulates else 0  # gradients of earlier microbatches: of all shards, until the last
    # What a process keeps of each gradient, and what it copies to a bucket, to be sent: in float32, but for shards.
    stays = 0.0 if accumulates else num_local / num_all * (1 if degrees.shard > 1 else 4 / width)
    copied = 4 / width if degrees.dp > 1 and degrees.shard == 1 else 0.0
    activations, gradients = trace.peak(stays + copied)
    in_backward = {
        "activations": activations,
        "gradients": earlier + round(stays * gradients),
        "gradients being sent": round(copied * gradients),
        "gathered blocks": gathered_bytes(units, width) if degrees.shard > 1 else 0,
    }
    in_update = {"gradients": 4 * num_local, "Muon": muon_bytes}
    peak = max(in_backward, in_update, key=lambda part: sum(part.values()))
    memory = {name: num_bytes for name, num_bytes in (always | peak).items() if num_bytes}
    sent = sent_bytes(config, degrees, unet, size, num_all, num_local)
    if muon_sent:
        width = iteration_dtype(config).itemsize
        sent["matrices for Muon"] = muon_sent + gathered_for_muon(matrices, unet, degrees, width)
    return ResourcePlan(memory, saving, sent)


def dtypes(config: TrainConfig) -> tuple[torch.dtype, torch.dtype]:
    """-> (of the weights that compute, of autocast; float32: no autocast)."""
    low = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    return (low, torch.float32) if config.fp16_opt_level == "O2" else (torch.float32, low)


# Memory of the weights


def gather_units(
    unet: UViTT2IModel, text_encoder: nn.Module | None, projector: Projector | None = None
) -> list[list[Tensor]]:
    """Parameters that sharded processes gather together: of the projector, of each block, of the rest of the U-ViT, of
    the encoder.
    """
    blocks = [list(block.parameters()) for block in blocks_in_order(unet)]
    in_blocks = {parameter for block in blocks for parameter in block}
    rest = [parameter for parameter in unet.parameters() if parameter not in in_blocks]
    first, last = ([list(other.parameters())] if other is not None else [] for other in (projector, text_encoder))
    return [*first, *blocks, rest, *last]


def num_local_elements(parameters: Iterable[Tensor], shard: int = 1) -> int:
    """Elements that the first of `shard` processes holds. A tensor is cut along a dim that divides evenly, if any, or
    else along the first.
    """
    total = 0
    for parameter in parameters:
        even = any(length % shard == 0 for length in parameter.shape)
        first = parameter.shape[0]
        total += parameter.numel() // shard if even else parameter.numel() // first * math.ceil(first / shard)
    return total


def gathered_bytes(units: list[list[Tensor]], width: int) -> int:
    """Of two blocks, the gradients of one of them and their float32 copy to be sent, and of everything outside blocks
    with the float32 copy of its gradients.
    """
    *blocks, last = map(num_local_elements, units)
    return (width + 4) * last + (3 * width + 4) * max(blocks)


# Traffic


def sent_bytes(
    config: TrainConfig, degrees: Degrees, unet: UViTT2IModel, size: tuple[int, int], num_all: int, num_local: int
) -> dict[str, int]:
    """Collectives run in rings: of n processes, each sends (n - 1) / n of what is gathered or scattered, and twice that
    of a sum.

    Weights are sent as they compute, gradients in float32. `num_all`, `num_local`: elements of the weights, in all and
    in one process.
    """
    dp, shard, tp = degrees.dp, degrees.shard, degrees.tp
    num_microbatches, width = config.gradient_accumulation_steps, dtypes(config)[0].itemsize
    sent = {
        "gradients between replicas": 2 * (dp - 1) / dp * 4 * num_local,
        "weights between shards": num_microbatches * 2 * (shard - 1) / shard * width * num_all,
        "gradients between shards": (shard - 1) / shard * 4 * num_all,
        "activations within blocks": num_microbatches * 2 * (tp - 1) / tp * summed_bytes(config, unet, size),
    }
    return {name: round(num_bytes) for name, num_bytes in sent.items() if num_bytes}


def gathered_for_muon(matrices: Iterable[Tensor], unet: UViTT2IModel, degrees: Degrees, width: int) -> int:
    """Of the block matrices that a process of a tensor parallel group has: all shards first; then the parts of all
    ranks of the group, where it splits the matrix.
    """
    shard, tp = degrees.shard, degrees.tp
    num_elements = sum(matrix.numel() for matrix in matrices)
    whole = {weight for name, weight in unet.named_parameters() if "skip_linear" in name}
    split = set(unet.parameters()) - whole
    num_split = sum(matrix.numel() for matrix in matrices if matrix in split)
    return round(width * ((shard - 1) / shard * num_elements + (tp - 1) * num_split))


def summed_bytes(config: TrainConfig, unet: UViTT2IModel, size: tuple[int, int]) -> int:
    """Of the activations and their gradients that tensor parallel processes sum in a microbatch.

    Forward: the outputs of attention and MLP. Backward: the gradients of their inputs.
    """
    compute, autocast = dtypes(config)
    forward_width, backward_width = min(compute.itemsize, autocast.itemsize), compute.itemsize
    patches = size[0] * size[1] // unet.patch_size**2
    tokens = unet.num_extra_tokens + patches
    blocks = blocks_in_order(unet)
    num_outputs = [tokens] * (len(blocks) - 1) + [patches]  # the last block computes the patches only
    # A block is recomputed as far as its backward needs, which is not the output of its MLP.
    forward = sum((3 if config.recompute else 2) * outputs for outputs in num_outputs)
    backward = sum(tokens + outputs for outputs in num_outputs)
    dim = blocks[0].mlp.fc2.out_features
    return config.per_device_train_batch_size * dim * (forward_width * forward + backward_width * backward)
