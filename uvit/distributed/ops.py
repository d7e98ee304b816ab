"""What the processes of a run exchange: gradients, norms, flags. A single process exchanges nothing.

All functions that take a `World` are collective: every process calls them at the same point of the program.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from uvit.distributed.mesh import World
from uvit.errors import UserError

T = TypeVar("T")

# Normalize each head of queries and keys: under tensor parallelism, a process has the gradient of its own heads only.
HEAD_NORMS = ("attn.q_norm.weight", "attn.k_norm.weight")
ODD = 0x1E3779B97F4A7C15  # 2^64 / golden ratio, without its first bit: spreads the numbers of neighbours
DIGEST_ELEMENTS = 2**22  # at a time: a checksum needs 32 bytes for each
BUCKET_BYTES = 25 * 2**20  # gradients per all-reduce: few calls, and early enough to overlap with the backward


@torch.no_grad()
def local_tensor(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, or a plain tensor itself: in the same memory, detached from autograd."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    assert not any(placement.is_partial() for placement in tensor.placements), "a partial sum"
    return tensor.to_local().detach()


def sharded_axes(tensor: Tensor) -> tuple[str, ...]:
    """The axes of the mesh along which a tensor is sharded. Along the others it is replicated."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    return tuple(name for name, p in zip(names, tensor.placements, strict=True) if not p.is_replicate())


@torch.no_grad()
def whole_tensor(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which `part` is this process's part, laid out as `like`, in every process."""
    if not isinstance(like, DTensor):
        return part
    whole = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    placements = list(like.placements)
    for i in range(len(placements)):  # one axis after another: torch warns where two axes cut one dim
        placements[i] = Replicate()
        whole = whole.redistribute(placements=placements)
    return whole.to_local()


@torch.no_grad()
def map_in_parts(function: Callable[[Tensor], Tensor], batch: Tensor, world: World | None) -> Tensor:
    """`function(batch)`, of which each process computes a part, for all of them.

    The batch (N, ...) is the same in all processes. The function treats its members one by one, and keeps shape and
    dtype, also of an empty batch.
    """
    if world is None or world.size == 1:
        return function(batch)
    count = -(-len(batch) // world.size)
    own = batch[world.rank * count : (world.rank + 1) * count]
    part = torch.cat([function(own), own.new_zeros(count - len(own), *own.shape[1:])])
    parts = batch.new_empty(world.size * count, *batch.shape[1:])
    # As bytes: a backend that moves them need not know the dtype.
    dist.all_gather_into_tensor(parts.view(torch.uint8), part.contiguous().view(torch.uint8))
    return parts[: len(batch)]


def fused_groups(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups of parameters that one fused or foreach kernel accepts: plain tensors, or DTensors of one mesh."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        key = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())


# Gradients


class GradientAverage:
    """Averages gradients over the data ranks, during the backward of a step's last microbatch.

        for i in range(accumulation_steps):
            average.microbatch(last=i == accumulation_steps - 1)
            loss.backward()
        average.finish()

    Fully sharded networks average by themselves; this class only selects the microbatch. For replicas, a bucket of
    gradients is summed as soon as it is complete, while the backward continues. A parameter must have a gradient in all
    processes or in none. The gradients of HEAD_NORMS are summed over the tensor parallel processes too.

    Args:
        networks: what computes.
        master: the same networks in float32, if `networks` is a copy of them in low precision. It gets the gradients:
            they are added up over microbatches, and over processes, in float32.
    """

    def __init__(
        self, networks: nn.Module, world: World, bucket_bytes: int = BUCKET_BYTES, master: nn.Module | None = None
    ):
        self.world = world
        owners = networks if master is None else master
        self.owner = dict(zip(networks.parameters(), owners.parameters(), strict=True))  # who keeps the gradient
        self.has_copy = owners is not networks
        self.sharded = [module for module in networks.modules() if isinstance(module, FSDPModule)]
        self.buckets: list[list[nn.Parameter]] = []
        self.missing: list[int] = []  # how many gradients each bucket still waits for
        self.last = False
        self.sent: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        split_heads = world.degrees.tp > 1
        self.head_norms = [p for name, p in owners.named_parameters() if split_heads and name.endswith(HEAD_NORMS)]
        trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
        if self.has_copy and not self.sharded:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(self._hand_over)
        if world.degrees.dp > 1 and not self.sharded:
            self._hook(trained, bucket_bytes)

    @torch.no_grad()
    def _hand_over(self, parameter: Tensor) -> None:
        """Add a copy's gradient to that of the float32 parameter."""
        owner, grad = self.owner[parameter], parameter.grad  # type: ignore[index]
        assert grad is not None
        owner.grad = grad.float() if owner.grad is None else owner.grad.add_(grad)
        parameter.grad = None

    def _hook(self, parameters: list[nn.Parameter], bucket_bytes: int) -> None:
        filled = bucket_bytes
        for parameter in reversed(parameters):  # roughly the order in which the backward reaches them
            size = local_tensor(self.owner[parameter]).nbytes
            if filled + size > bucket_bytes or parameter.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                filled = 0
            filled += size
            self.buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(self._ready(len(self.buckets) - 1))

    def _ready(self, bucket: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self.last:
                self.missing[bucket] -= 1
                # Always in the order of the buckets, so that all processes send alike.
                while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                    self._send()

        return hook

    @torch.no_grad()
    def _send(self) -> None:
        parameters = self.buckets[len(self.sent)]
        owners = [self.owner[parameter] for parameter in parameters]
        grads = [local_tensor(owner.grad) for owner in owners if owner.grad is not None]
        if not grads:
            grads = [torch.zeros(1, device=self.world.device)]
        flat = torch.cat([grad.flatten() for grad in grads])
        flat.div_(self.world.degrees.dp)  # before the sum, so that float16 overflows only if the mean does
        work = dist.all_reduce(flat, group=self.world.group("dp"), async_op=True)
        assert work is not None
        self.sent.append((grads, flat, work))

    def microbatch(self, last: bool) -> None:
        """Call before each backward."""
        self.last = last
        self.missing = [len(bucket) for bucket in self.buckets]
        for module in self.sharded:
            module.set_requires_gradient_sync(last, recurse=False)

    @torch.no_grad()
    def finish(self) -> None:
        """Call after the last backward. Every gradient is then the mean over the data ranks, in float32."""
        if self.has_copy and self.sharded:
            for parameter in self.owner:
                if parameter.grad is not None:
                    self._hand_over(parameter)
        while len(self.sent) < len(self.buckets):  # buckets with parameters that have no gradient
            self._send()
        for grads, flat, work in self.sent:
            work.wait()
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
        self.sent = []
        self.last = False
        if grads := [local_tensor(parameter.grad) for parameter in self.head_norms if parameter.grad is not None]:
            flat = torch.cat(grads)
            dist.all_reduce(flat, group=self.world.group("tp"))
            torch._foreach_copy_(grads, list(flat.split([len(grad) for grad in grads])))


class GradientNorm:
    """The 2-norm of all gradients together, the same in every process: a 0-d tensor, for which nobody waits.

    Call it after the gradients are averaged: replicas then have equal gradients, and nothing is summed over `dp`. A NaN
    or Inf in one process gives a NaN or Inf norm in all. (torch's own function does not accept several meshes.)
    """

    def __init__(self, parameters: Iterable[Tensor], world: World):
        self.world, self.parameters = world, list(parameters)
        # Sums of squares by the axes along which the gradients are sharded. `dp` only replicates.
        self.parts: dict[tuple[str, ...], list[Tensor]] = {(): [], ("shard",): [], ("tp",): [], ("shard", "tp"): []}
        for parameter in self.parameters if world.parallel else ():
            self.parts[sharded_axes(parameter)].append(parameter)
        self.sharded = {
            axis: torch.tensor([axis in axes for axes in self.parts], device=world.device)
            for axis in world.axes("shard", "tp")
        }

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if not self.world.parallel:
            return torch.nn.utils.get_total_norm(local_grads(self.parameters))
        norms = [torch.nn.utils.get_total_norm(local_grads(part)) for part in self.parts.values()]
        squares = torch.stack([norm.square().to(self.world.device) for norm in norms])
        for axis, sharded in self.sharded.items():
            total = squares.clone()
            dist.all_reduce(total, group=self.world.group(axis))
            squares = torch.where(sharded, total, squares)
        return squares.sum().sqrt()


def local_grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The local gradients of the parameters that have one."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [local_tensor(grad) if isinstance(grad, DTensor) else grad for grad in grads]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm is at most `max_norm`. `norm` is their norm now."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if is_known(factor) and factor == 1:
        return  # most gradients of most runs: a factor of 1 would only read and write them
    torch._foreach_mul_(local_grads(parameters), factor)


def is_known(flag: Tensor) -> bool:
    """Whether the host has the value of a tensor already. It would wait for that of another device."""
    return flag.device.type == "cpu"


# Numbers, flags, objects


def mean_over_data(value: Tensor, world: World) -> Tensor:
    """The mean of a tensor, such as a loss, over the data ranks."""
    value = value.detach().clone()
    for axis in world.axes("dp", "shard"):
        dist.all_reduce(value, group=world.group(axis))
    return value / world.num_data_ranks if world.num_data_ranks > 1 else value


def sum_over_all(values: Tensor, world: World) -> Tensor:
    """The sums of numbers over all processes."""
    values = values.detach().clone()
    if world.parallel:
        dist.all_reduce(values)
    return values


def any_of(flag: bool, world: World) -> bool:
    """Whether the flag is set in any process. Hosts wait for one another, and not for their devices."""
    if not world.parallel:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


class LateFlag:
    """A flag that may be set in any process. All know it one call later, so that a call need not wait for the others.

    A process that is alone knows it at once.
    """

    def __init__(self, world: World):
        self.world = world
        self.sent: tuple[Tensor, dist.Work] | None = None

    def __call__(self, flag: bool) -> bool:
        if not self.world.parallel:
            return flag
        known = self._receive()
        value = torch.tensor(int(flag))
        work = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self.sent = (value, work)
        return known

    def _receive(self) -> bool:
        if self.sent is None:
            return False
        value, work = self.sent
        work.wait()
        return bool(value.item())


def barrier(world: World) -> None:
    """Wait until every process is here."""
    any_of(False, world)


def broadcast(value: T, world: World) -> T:
    """The value of the main process, in every process."""
    if not world.parallel:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def all_gather(value: T, world: World) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if not world.parallel:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], T], world: World) -> T:
    """Call a function in the main process. All processes return its value, or raise its UserError.

    If it fails in another way, the other processes raise a UserError that says how, and do not wait for it.
    """
    value: T | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            value = function()
        except Exception as raised:  # raised below, once the other processes know
            error = raised
    told = UserError(f"process 0 failed: {error!r}") if error and not isinstance(error, UserError) else error
    value, told = broadcast((value, told), world)
    if error or told:
        raise error or told  # type: ignore[misc]
    return value  # type: ignore[return-value]


# Replicas


def differing_replicas(tensors: Mapping[str, Tensor], world: World) -> list[str]:
    """The names of tensors that differ in any bit between replicas; empty if all are equal.

    Reads every byte, where the tensors are, so do not call it at every step.
    """
    if not world.parallel:
        return []
    names = list(tensors)
    digests = torch.stack([digest(tensors[name]) for name in names])
    differs = torch.zeros_like(digests)
    for axis in world.axes():
        lowest, highest = digests.clone(), digests.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=world.group(axis))
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=world.group(axis))
        replicated = torch.tensor([axis not in sharded_axes(tensors[name]) for name in names], device=world.device)
        differs |= ((lowest != highest) & replicated).long()
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    return [name for name, found in zip(names, differs.tolist(), strict=True) if found]


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """A checksum of the local tensor's bits: int64, on its device."""
    local = local_tensor(tensor).contiguous().flatten()
    if not local.is_cpu:
        return sum_of_bits(local)
    sha256 = hashlib.sha256(local.view(torch.uint8).numpy().data).digest()  # on a CPU the faster of the two
    return torch.tensor(int.from_bytes(sha256[:8], "little", signed=True))


def sum_of_bits(local: Tensor) -> Tensor:
    """The sum of a flat tensor's bits, each element times an odd number of its place, modulo 2^64.

    A change of a single element always changes it, and other changes almost always. Nothing leaves the device.
    """
    bits = local.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), DIGEST_ELEMENTS):
        part = bits[start : start + DIGEST_ELEMENTS]
        places = torch.arange(start, start + len(part), device=bits.device)
        total += ((places * ODD ^ places * ODD >> 29) | 1).mul_(part).sum()
    return total
