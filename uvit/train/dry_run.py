"""What each process of a run holds at the fullest moment of a step, and what it sends to the others in a step.

Shapes alone: no process is started and no memory taken, whatever the number of processes. A step is followed as
`uvit.distributed` lays it out: replicas send their gradients in buckets while the backward goes on, shards are gathered
a block at a time, tensor parallel processes add up what comes out of attention and MLPs.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.device import pick_device
from uvit.distributed.mesh import Degrees, World
from uvit.distributed.parallelize import check_divisibility
from uvit.errors import UserError
from uvit.model import Block, UViTT2IModel
from uvit.store.reader import open_features
from uvit.store.types import Features
from uvit.train.checks import check_features, check_pretrained
from uvit.train.profiling import count_flops, meta_inputs, meta_unet
from uvit.train.setup import build_text_encoder, load_frozen_text_encoder, model_config, open_validation
from uvit.weights.components import read_network
from uvit.weights.detect import is_third_party
from uvit.weights.encoders import encode_tokens

Encode = tuple[nn.Module, Callable[[Tensor], Tensor]]  # a text encoder on the meta device, and what computes with it


@dataclass(frozen=True)
class ResourcePlan:
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
) -> ResourcePlan:
    """size: of the latents. `text_encoder`: that is trained; it is changed. `frozen_bytes`: of one that is not."""
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    compute, autocast = dtypes(config)
    width, has_copy = compute.itemsize, compute != torch.float32
    unet = meta_unet(model_config, degrees.tp)
    units = units_of(unet, text_encoder[0] if text_encoder else None)
    whole = sum(num_local_elements(unit) for unit in units)
    held = sum(num_local_elements(unit, degrees.shard) for unit in units)

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
    return ResourcePlan(memory, saving, sent_bytes(config, degrees, unet, size, width * whole, width * held))


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


def num_local_elements(parameters: Iterable[Tensor], shard: int = 1) -> int:
    """Elements that the first of `shard` processes holds, cut along a dim that divides evenly or else the first."""
    total = 0
    for parameter in parameters:
        even = any(length % shard == 0 for length in parameter.shape)
        first = parameter.shape[0]
        total += parameter.numel() // shard if even else parameter.numel() // first * math.ceil(first / shard)
    return total


def gathered_bytes(units: list[list[Tensor]], width: int) -> int:
    """Of a block at work and the next one, with the gradients of the first, and all outside of blocks with its own."""
    *blocks, last = (width * num_local_elements(unit) for unit in units)
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


# Work and memory of a U-ViT, counted without doing the work or taking the memory


# Memory


@dataclass(frozen=True)
class MemoryTrace:
    """Bytes alive after each operation of a forward and backward pass, besides the weights."""

    activations: list[int]  # what the backward needs, and what is in the making
    gradients: list[int]  # of weights, made so far
    kept: int  # by the forward for the backward

    def fullest(self, gradient_weight: float = 1.0) -> tuple[int, int]:
        """-> (activations, gradients) at the moment when most is alive, each byte of gradients counted so often."""
        moments = zip(self.activations, self.gradients, strict=True)
        return max(moments, key=lambda moment: moment[0] + gradient_weight * moment[1])


def trace_step(
    model_config: dict[str, Any],
    batch_size: int,
    size: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype = torch.float32,
    recompute: bool = False,
    tp: int = 1,
    encode: tuple[nn.Module, Callable[[Tensor], Tensor]] | None = None,
) -> MemoryTrace:
    """What a training step's forward and backward keep, in a CPU's kernels but for layer norms under autocast.

    A GPU's autocast computes those in float32, and keeps their inputs so; a CPU's leaves them in low precision.

    Args:
        size: height and width of the latents, where not the model's own.
        dtype, autocast: of the weights that compute, and of autocast (float32: none).
        encode: a text encoder that is trained as well, on the meta device, and what turns token ids into context
            with it. It is changed.
    """
    unet = meta_unet(model_config, tp)
    if recompute:
        unet.enable_gradient_checkpointing()
    networks = nn.ModuleList([unet, encode[0]] if encode else [unet]).train()
    if autocast != torch.float32:
        norms_in_float32(networks)
    # All shape and no content, but on a CPU, whose attention kernel is fused; on the meta device it is not.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in networks.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))

        def compute() -> Tensor:
            latents, timesteps, context = meta_inputs(unet, batch_size, size)
            with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
                if encode:
                    context = encode[1](torch.zeros(context.shape[:2], dtype=torch.int64))
                return unet(latents.to(dtype), timesteps, context.to(dtype)).float().square().mean()

        return trace_memory(networks, compute)


def norms_in_float32(networks: nn.Module) -> None:
    """As a GPU's autocast computes them."""
    for module in networks.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def trace_memory(networks: nn.Module, compute: Callable[[], Tensor]) -> MemoryTrace:
    """Follow the memory of `compute() -> loss` and its backward."""
    gradients = 0

    def count(parameter: Tensor) -> None:
        nonlocal gradients
        assert parameter.grad is not None
        gradients += parameter.grad.nbytes

    handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in networks.parameters()]
    moments: list[tuple[int, int]] = []
    known = [*networks.parameters(), *networks.buffers()]
    with MemoryTracker(known, lambda num_bytes: moments.append((num_bytes, gradients))) as alive:
        loss = compute()
        kept = alive.bytes
        loss.backward()
        del loss
    moments.append((alive.bytes, gradients))
    for handle in handles:
        handle.remove()
    return MemoryTrace([num_bytes - grads for num_bytes, grads in moments], [grads for _, grads in moments], kept)


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live; calls `after` with that."""

    def __init__(self, known: list[Tensor], after: Callable[[int], None]):
        """known: not to count."""
        super().__init__()
        self.bytes = 0
        self.after = after
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        self.after(self.bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


# What a run will need, before it starts: for any number of processes, none of which is started


MIB = 2**20


@dataclass(frozen=True)
class MetaRun:
    """What `set_up` would make a run of, its networks on the meta device."""

    config: TrainConfig
    features: Features
    validation: Features | None
    unet: UViTT2IModel
    text_encoder: nn.Module | None  # that is trained
    frozen: nn.Module | None  # text encoder that is not
    pad_token_id: int
    degrees: Degrees


def look(config: TrainConfig) -> MetaRun:
    """Raises the UserErrors that `set_up` would raise."""
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    device = pick_device(config.device)
    features = open_features(config.feature_path, "train", "feature_path")
    check_pretrained(config, features)
    unet = build_meta_unet(config)
    use_tokens = config.train_text_encoder or features.context_shape is None
    check_features(config, features, unet, use_tokens, "feature_path", config.feature_path)
    check_divisibility(blocks_of(unet)[0], World(0, degrees.product, degrees, device, None))
    validation = open_validation(config, features, unet, use_tokens)
    trained, frozen, pad_token_id = None, None, 0
    if config.train_text_encoder:
        trained, pad_token_id = build_text_encoder(config, features, unet)
        trained.to("meta")
    elif use_tokens:
        frozen, pad_token_id, _ = load_frozen_text_encoder(config, features, unet)
        frozen.to("meta")
    return MetaRun(config, features, validation, unet, trained, frozen, pad_token_id, degrees)


def build_meta_unet(config: TrainConfig) -> UViTT2IModel:
    name = config.pretrained_model_name_or_path
    if name is None:
        return meta_unet(resolve_model_config(config.uvit_config_file))
    if is_third_party(name):
        return meta_unet(model_config(read_network(Path(name).expanduser(), "unet")))
    try:
        values: Any = UViTT2IModel.load_config(name, subfolder="unet")
    except OSError as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: has no U-ViT in unet/ ({error})") from None
    return meta_unet({key: value for key, value in values.items() if not key.startswith("_")})


def describe_plan(config: TrainConfig) -> str:
    """Model, FLOPs, memory, traffic and epochs of a run, in lines for people."""
    run = look(config)
    features, degrees, frozen = run.features, run.degrees, run.frozen
    num_unet, num_text = (num_parameters(network) for network in (run.unet, run.text_encoder))
    num_data_ranks = degrees.dp * degrees.shard
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_data_ranks
    steps_per_epoch = features.num_samples / samples
    max_steps = config.max_steps
    if config.num_train_epochs:
        max_steps = max(1, round(config.num_train_epochs * steps_per_epoch))
    plan = plan_of_run(run)  # after what counts the text encoder: it is changed there
    forward_flops, both_flops = count_flops(model_config(run.unet), size=features.moments_shape[1:])  # type: ignore[arg-type]
    if config.recompute:
        both_flops += forward_flops
    text_flops = 0 if frozen is None else count_text_flops(frozen, features.num_tokens or 0)
    step_flops = (both_flops + text_flops) * samples
    ranks = f" x {num_data_ranks} data ranks" if num_data_ranks > 1 else ""
    lines = [
        f"model        {config.pretrained_model_name_or_path or config.uvit_config_file}: {num_unet:,} parameters"
        + (f", and {num_text:,} of the text encoder" if num_text else ""),
        f"work         {forward_flops / 1e9:,.1f} GFLOP a forward pass of one sample, "
        + (f"{text_flops / 1e9:,.1f} of the frozen text encoder, " if frozen is not None else "")
        + f"{step_flops / 1e12:,.2f} TFLOP a step",
        f"batch        {config.per_device_train_batch_size} x {config.gradient_accumulation_steps}{ranks} = "
        f"{samples:,} samples",
        *plan_lines(plan, degrees),
        f"data         {features.num_samples:,} samples, {steps_per_epoch:,.1f} steps an epoch",
        *validation_line(run),
        f"run          {max_steps:,} steps, {max_steps / steps_per_epoch:,.1f} epochs, "
        f"{step_flops * max_steps:.2e} FLOP",
    ]
    return "\n".join(lines)


def plan_of_run(run: MetaRun) -> ResourcePlan:
    trained, frozen = run.text_encoder, run.frozen

    def encode(token_ids: Tensor) -> Tensor:
        return encode_tokens(trained, token_ids, run.pad_token_id)

    return make_plan(
        run.config,
        model_config(run.unet),
        run.features.moments_shape[1:],  # type: ignore[arg-type]
        (trained, encode) if trained is not None else None,
        0 if frozen is None else sum(parameter.nbytes for parameter in frozen.parameters()),
    )


def plan_lines(plan: ResourcePlan, degrees: Degrees) -> list[str]:
    each = " a process" if degrees.product > 1 else ""
    copies = " in each process of one replica" if degrees.dp > 1 else each
    lines = [
        f"memory       {in_mib(sum(plan.memory.values()))} MiB{each}, when a step has most = {listed(plan.memory)}",
        f"             and {in_mib(plan.saving)} MiB of ordinary memory{copies} to copy checkpoints to",
    ]
    if not each:
        return lines
    traffic = f"traffic      {in_mib(sum(plan.sent.values()))} MiB sent{each}, a step = {listed(plan.sent)}"
    return [f"processes    {degrees}", *lines, traffic]


def listed(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {in_mib(num_bytes)}" for name, num_bytes in parts.items())


def in_mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f}"


def num_parameters(network: nn.Module | None) -> int:
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def validation_line(run: MetaRun) -> list[str]:
    if run.validation is None:
        return []
    num_available = run.validation.num_samples
    num_samples = min(run.config.num_validation_samples, num_available)
    return [f"validation   {num_samples:,} of {num_available:,} samples, every {run.config.eval_steps:,} steps"]


def count_text_flops(hollow_text_encoder: Any, num_tokens: int) -> int:
    """FLOPs of a caption's way through a text encoder on the meta device, counted like the U-ViT's."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hollow_text_encoder(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"))
    return counter.get_total_flops()
