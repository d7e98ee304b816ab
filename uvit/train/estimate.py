"""What a run will need, before it starts: for any number of processes, none of which is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.convert.folder import looks_foreign, open_part
from uvit.cost import count_flops, hollow_unet
from uvit.data.encoders import encode_tokens
from uvit.data.features import Features, open_features
from uvit.device import pick_device
from uvit.distributed.mesh import Degrees, World
from uvit.distributed.parallelize import check_sizes
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.train.checks import check_features, check_pretrained
from uvit.train.plan import Plan, blocks_of, make_plan
from uvit.train.setup import model_config, open_validation
from uvit.train.text import build_text_encoder, load_frozen_text_encoder

MIB = 2**20


@dataclass(frozen=True)
class HollowRun:
    """What `set_up` would make a run of, its networks on the meta device."""

    config: TrainConfig
    features: Features
    validation: Features | None
    unet: UViTT2IModel
    text_encoder: nn.Module | None  # that is trained
    frozen: nn.Module | None  # text encoder that is not
    pad_token_id: int
    degrees: Degrees


def look(config: TrainConfig) -> HollowRun:
    """Raises the UserErrors that `set_up` would raise."""
    degrees = Degrees(config.dp_degree, config.sharding_parallel_degree, config.tensor_parallel_degree)
    device = pick_device(config.device)
    features = open_features(config.feature_path, "train", "feature_path")
    check_pretrained(config, features)
    unet = build_hollow_unet(config)
    use_tokens = config.train_text_encoder or features.context_shape is None
    check_features(config, features, unet, use_tokens, "feature_path", config.feature_path)
    check_sizes(blocks_of(unet)[0], World(0, degrees.product, degrees, device, None))
    validation = open_validation(config, features, unet, use_tokens)
    trained, frozen, pad_token_id = None, None, 0
    if config.train_text_encoder:
        trained, pad_token_id = build_text_encoder(config, features, unet)
        trained.to("meta")
    elif use_tokens:
        frozen, pad_token_id, _ = load_frozen_text_encoder(config, features, unet)
        frozen.to("meta")
    return HollowRun(config, features, validation, unet, trained, frozen, pad_token_id, degrees)


def build_hollow_unet(config: TrainConfig) -> UViTT2IModel:
    name = config.pretrained_model_name_or_path
    if name is None:
        return hollow_unet(resolve_model_config(config.uvit_config_file))
    if looks_foreign(name):
        return hollow_unet(model_config(open_part(Path(name).expanduser(), "unet")))
    try:
        values: Any = UViTT2IModel.load_config(name, subfolder="unet")
    except OSError as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: has no U-ViT in unet/ ({error})") from None
    return hollow_unet({key: value for key, value in values.items() if not key.startswith("_")})


def describe(config: TrainConfig) -> str:
    """Model, FLOPs, memory, traffic and epochs of a run, in lines for people."""
    run = look(config)
    features, degrees, frozen = run.features, run.degrees, run.frozen
    num_unet, num_text = (numel(network) for network in (run.unet, run.text_encoder))
    num_data_ranks = degrees.dp * degrees.shard
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_data_ranks
    steps_per_epoch = features.num_samples / samples
    max_steps = config.max_steps
    if config.num_train_epochs:
        max_steps = max(1, round(config.num_train_epochs * steps_per_epoch))
    plan = plan_of(run)  # after what counts the text encoder: it is changed there
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


def plan_of(run: HollowRun) -> Plan:
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


def plan_lines(plan: Plan, degrees: Degrees) -> list[str]:
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


def numel(network: nn.Module | None) -> int:
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def validation_line(run: HollowRun) -> list[str]:
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
