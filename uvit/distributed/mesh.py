"""The processes of a run and their mesh.

The mesh has three axes: `dp` (replicas) x `shard` (fully sharded data parallel) x `tp` (tensor parallel). `tp` is
innermost, so that the processes that communicate most are neighbours. The processes of a tp group read the same data.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout  # torch has no public one

from uvit.device import pick_device
from uvit.errors import UserError

AXES = ("dp", "shard", "tp")
# How long a process waits for the others in one collective, before torch gives up and the run ends.
START_TIMEOUT = timedelta(hours=1)  # while features are checked, models compiled and checkpoints read; for export
STEP_TIMEOUT = timedelta(minutes=30)  # from step to step, with validation and evaluation between them


@dataclass(frozen=True)
class Degrees:
    """The number of processes along each axis."""

    dp: int = 1
    shard: int = 1
    tp: int = 1

    @property
    def product(self) -> int:
        return self.dp * self.shard * self.tp

    def __str__(self) -> str:
        return (
            f"--dp_degree {self.dp} x --sharding_parallel_degree {self.shard} x --tensor_parallel_degree {self.tp} = "
            f"{self.product}"
        )


@dataclass(frozen=True)
class World:
    """The rank of this process among `size` processes. A single process has no mesh and no torch.distributed."""

    rank: int
    size: int
    degrees: Degrees
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def parallel(self) -> bool:
        return self.mesh is not None

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `num_data_ranks` parts of each batch this process reads."""
        return self.rank // self.degrees.tp

    @property
    def tp_rank(self) -> int:
        """Which part of each transformer block this process computes."""
        return self.rank % self.degrees.tp

    @property
    def num_data_ranks(self) -> int:
        return self.degrees.dp * self.degrees.shard

    def axes(self, *names: str) -> list[str]:
        """The axes, of those named or of all, with more than one process."""
        return [name for name in names or AXES if getattr(self.degrees, name) > 1]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this process along one axis."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)


def single_process_world(device: str = "auto") -> World:
    """The world of a single process."""
    return World(0, 1, Degrees(), pick_device(device), None)


def init_distributed(degrees: Degrees, device: str = "auto") -> World:
    """Join the processes that torchrun started, if any. Raises UserError if their number does not match the degrees."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_degrees(degrees, size, launched="WORLD_SIZE" in os.environ)
    chosen = pick_device(device)
    if size == 1:
        return World(rank, size, degrees, chosen, None)
    if not dist.is_initialized():  # a process may build more than one mesh
        # Objects and flags on the CPU use gloo, also next to NCCL.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=restart_safe_store(), rank=rank, world_size=size, timeout=START_TIMEOUT)
    if chosen.type == "cuda":
        gpus: list[tuple[str, str]] = [("", "")] * size
        uuid = str(torch.cuda.get_device_properties(chosen).uuid)
        dist.all_gather_object(gpus, (socket.gethostname(), uuid))
        check_gpus(gpus, device)
    mesh = init_device_mesh(chosen.type, (degrees.dp, degrees.shard, degrees.tp), mesh_dim_names=AXES)
    world = World(rank, size, degrees, chosen, mesh)
    set_timeout(world, START_TIMEOUT)
    return world


def check_gpus(gpus: Sequence[tuple[str, str]], device: str) -> None:
    """`gpus`: (host, UUID) of each process's. Raises UserError if two processes have the same one."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) != rank:
            host, there = gpu[0], sum(host == gpu[0] for host, _ in gpus)
            raise UserError(
                f"--device {device}: processes {first} and {rank} would share a GPU of {host}, which NCCL does not "
                f"allow; pass --device cuda, and start as many processes on it as it has GPUs, not {there}"
            )


def set_step_timeout(world: World, hang_timeout: float) -> None:
    """STEP_TIMEOUT, or longer, so that all processes have long printed their stacks when torch gives up."""
    set_timeout(world, max(STEP_TIMEOUT, 2 * timedelta(seconds=hang_timeout)))


def set_timeout(world: World, timeout: timedelta) -> None:
    """How long collectives wait from now on, over all processes and along each axis of the mesh."""
    if world.mesh is None:
        return
    for group in dict.fromkeys([dist.group.WORLD, *(world.group(axis) for axis in AXES)]):
        set_group_timeout(timeout, group)


def restart_safe_store() -> dist.Store:
    """torchrun's store, without the addresses that processes before a restart left in it.

    Only on one machine: on several, torchrun does not count restarts alike on all of them.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def destroy_distributed(world: World) -> None:
    """Call at the end of the process."""
    if world.parallel:
        dist.destroy_process_group()


def check_degrees(degrees: Degrees, size: int, launched: bool) -> None:
    for name, value in zip(
        ("dp_degree", "sharding_parallel_degree", "tensor_parallel_degree"),
        (degrees.dp, degrees.shard, degrees.tp),
        strict=True,
    ):
        if value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    if degrees.product == size:
        return
    actual = "there is 1 process" if size == 1 else f"there are {size} processes"
    command = f"start them with torchrun --nproc_per_node {degrees.product} -m uvit train ..."
    if degrees.product == 1:
        command = "start one without torchrun"
    per_replica = degrees.shard * degrees.tp
    if not launched or size % per_replica:
        raise UserError(f"{degrees}, but {actual}; {command}")
    raise UserError(f"{degrees}, but {actual}; pass --dp_degree {size // per_replica}, or {command}")
