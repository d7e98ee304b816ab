"""What each process of a spawned world finds about its layout, for the tests to judge."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tests.distributed.whole import full
from uvit.checkpoint import layout as state
from uvit.distributed import ops
from uvit.distributed.mesh import AXES, START_TIMEOUT, World, set_step_timeout, set_timeout
from uvit.distributed.parallelize import parallelize
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.train.ema import EMA


def check(world: World, unet: UViTT2IModel, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    whole = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    snapshot = written_average(unet, world)
    parallelize(unet, world)
    return {
        "snapshot": alike(snapshot, whole) if world.is_main else list(snapshot),
        "place": [world.data_rank, world.num_data_ranks, world.tp_rank, world.is_main],
        "held": {name: ops.local_tensor(parameter).numel() for name, parameter in unet.named_parameters()},
        "inner": inner_widths(unet, inputs),
        "forward_alone": forward_alone(unet, inputs),
        "numbers": numbers(world),
        "failures": failures(world),
        "unused": unused(world),
        "infinite": infinite(world, unet, inputs),
        "full": alike(full(dict(unet.named_parameters()), world), whole),
        "loaded": loaded(world, unet, whole),
        "replicas": replicas(world, unet),
        "in_parts": in_parts(world),
        "timeouts": timeouts(world),
    }


def in_parts(world: World) -> list[Any]:
    """For batches of 1, 5 and 8: how many members this process squared, and whether it has the squares of all."""
    found: list[Any] = []

    def square(batch: Tensor) -> Tensor:
        found.append(len(batch))
        return batch.square()

    for size in (1, 5, 8):
        batch = torch.arange(size * 3, dtype=torch.bfloat16).view(size, 3, 1)
        found.append(torch.equal(ops.map_in_parts(square, batch, world), batch.square()))
    return found


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit alike or not in both."""
    return [
        name
        for name in found.keys() | wanted.keys()
        if name not in found or name not in wanted or not torch.equal(found[name], wanted[name])
    ]


def written_average(unet: UViTT2IModel, world: World) -> dict[str, Tensor]:
    """What is in the snapshot of an average of these weights, laid out as they will be; nothing but in the main one."""
    ema = EMA(unet, 0.9, lengths=(0.1,))
    parallelize(ema.model, world)  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        ema.write_snapshots(Path(folder), 1, world)
        return {
            name: tensor for path in Path(folder).rglob("*.safetensors") for name, tensor in load_file(path).items()
        }


def inner_widths(unet: UViTT2IModel, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, list[int]]:
    """Shapes of what qkv and fc1 put out in this process."""
    shapes: dict[str, list[int]] = {}
    block: Any = unet.mid_block
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: list(output.shape)}))
        for name, module in (("qkv", block.attn.qkv), ("fc1", block.mlp.fc1))
    ]
    with torch.no_grad():
        unet(*inputs)
    for handle in handles:
        handle.remove()
    return shapes


def forward_alone(unet: UViTT2IModel, inputs: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether a forward without a backward leaves the parameters as they were."""
    before = [(id(parameter), ops.local_tensor(parameter).shape) for parameter in unet.parameters()]
    with torch.no_grad():
        unet(*inputs)
    return before == [(id(parameter), ops.local_tensor(parameter).shape) for parameter in unet.parameters()]


def numbers(world: World) -> dict[str, Any]:
    late = ops.LateFlag(world)
    return {
        "mean": ops.mean_over_data(torch.tensor(float(world.data_rank)), world).item(),
        "any": [ops.any_of(world.rank == 1, world), ops.any_of(False, world)],
        "late": [late(flag) for flag in (world.rank == 1, False, False)],
        "from_main": ops.broadcast({"rank": world.rank}, world),
    }


def failures(world: World) -> list[list[str]]:
    """What each process raises where the main process fails, with a sentence for users and without."""

    def fail(error: Exception) -> None:
        raise error

    found = []
    for error in (UserError("--flag: no"), OSError(28, "No space")):
        try:
            ops.on_main(lambda error=error: fail(error), world)  # type: ignore[misc]
        except (UserError, OSError) as raised:
            found.append([type(raised).__name__, str(raised)])
    return found


def unused(world: World) -> list[float | None]:
    """Gradients over replicas of a parameter that a loss uses and of one that it does not."""
    if world.degrees.dp == 1 or world.degrees.shard > 1:
        return []
    network = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in ("used", "unused")})
    gradients = ops.GradientAverage(network, world)
    gradients.microbatch(last=True)
    (network["used"] * world.data_rank).sum().backward()
    gradients.finish()
    grads = [network[name].grad for name in ("used", "unused")]
    return [None if grad is None else grad.item() for grad in grads]


def infinite(world: World, unet: UViTT2IModel, inputs: tuple[Tensor, Tensor, Tensor]) -> list[bool]:
    """Whether the norm is finite: as it is, and where something in the last process alone is not."""
    last = world.rank == world.size - 1
    gradients = ops.GradientAverage(unet, world)
    found = []
    for scale in (1.0, torch.inf if last and world.degrees.dp > 1 else 1.0):
        gradients.microbatch(last=True)
        (unet(*inputs).square().mean() * scale).backward()
        gradients.finish()
        grad = unet.get_parameter("mid_block.mlp.fc1.weight").grad
        assert grad is not None
        if found and last and world.degrees.dp == 1:  # replicas would have shared it
            ops.local_tensor(grad).view(-1)[0] = torch.inf
        found.append(bool(ops.GradientNorm(unet.parameters(), world)().isfinite()))
        unet.zero_grad()
    return found


def loaded(world: World, unet: UViTT2IModel, whole: dict[str, Tensor]) -> list[str]:
    """Load other weights as a checkpoint does: each process the block that it holds. -> names that came out wrong."""
    other = {name: tensor + 1 for name, tensor in whole.items()}
    names = dict(unet.named_parameters())
    before = {name: ops.local_tensor(parameter).clone() for name, parameter in names.items()}
    target = state.to_checkpoint_layout(names, world)
    wrong = [name for name, tensor in target.items() if tensor.shape != whole[name].shape]
    with torch.no_grad():
        for name, tensor in target.items():
            block = other[name]
            if isinstance(tensor, DTensor):
                shape, offsets = compute_local_shape_and_global_offset(
                    tensor.shape, tensor.device_mesh, tensor.placements
                )
                block = block[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
            ops.local_tensor(tensor).copy_(block)
    state.from_checkpoint_layout(names, target, world)
    wrong += alike(full(names, world), other) if world.is_main else full(names, world).keys()
    for name, parameter in names.items():
        ops.local_tensor(parameter).copy_(before[name])
    return wrong


def replicas(world: World, unet: UViTT2IModel) -> list[list[str]]:
    """Tensors found to differ: at first; after the last process changed one bit of pos_embed; then of qkv too."""
    tensors = {
        name: ops.local_tensor(p).clone() if not isinstance(p, DTensor) else p.detach()
        for name, p in unet.named_parameters()
    }
    found = [ops.differing_replicas(tensors, world)]
    for name in ("pos_embed", "mid_block.attn.qkv.weight"):
        if world.rank == world.size - 1:
            bits = ops.local_tensor(tensors[name]).view(-1).view(torch.int32)
            bits[0] ^= 1
        found.append(ops.differing_replicas(tensors, world))
    return found


def timeouts(world: World) -> list[list[float]]:
    """Seconds that each group waits: at first, from the first step on, and the same with an hour of --hang_timeout."""

    def seconds() -> list[float]:
        groups = [dist.group.WORLD, *(world.group(axis) for axis in AXES)]
        return [group._get_backend(world.device).options._timeout.total_seconds() for group in groups]

    found = [seconds()]
    for hang_timeout in (600.0, 3600.0):
        set_step_timeout(world, hang_timeout)
        found.append(seconds())
    set_timeout(world, START_TIMEOUT)
    return found
