"""One of two processes that save and load: `python -m tests.checkpoint.saving_worker FOLDER`, RANK and WORLD_SIZE set.

Whatever is not as it should be is an error; what is left in FOLDER the test reads in a world of one.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.worker import TINY
from uvit.checkpoint.folder import Checkpoint, checkpoint_folders, read_checkpoint
from uvit.checkpoint.layout import from_checkpoint_layout, to_checkpoint_layout
from uvit.checkpoint.saver import AllGather, Saver, all_gather_channel
from uvit.distributed import mesh, ops
from uvit.distributed.mesh import Degrees, World
from uvit.distributed.parallelize import parallelize
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.train.optimizer import flatten_optimizer, init_optimizer_state

SHAPES: list[tuple[int, ...]] = [(6, 4), (5, 3), (1, 4), (7,), (), (2, 3, 5)]
LAYOUTS = ("rows", "columns", "replicated", "plain")
NETWORKS = {"sharded": Degrees(shard=2), "tensor_parallel": Degrees(tp=2), "replicas": Degrees(dp=2)}


def whole(offset: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"t{i}": torch.randn(shape, generator=generator) + offset for i, shape in enumerate(SHAPES)}


def lay_out(tensor: Tensor, layout: str, axis: DeviceMesh) -> Tensor:
    if layout == "plain":
        return tensor
    dim = {"rows": 0, "columns": 1, "replicated": 99}[layout]
    return distribute_tensor(tensor, axis, [Shard(dim) if dim < tensor.ndim else Replicate()])


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def every_layout_reads_every_other(folder: Path, axis: DeviceMesh, world: World, all_gather: AllGather) -> None:
    with Saver(folder, rank=world.rank, all_gather=all_gather) as saver:
        for i, layout in enumerate(LAYOUTS):
            tensors = {name: lay_out(tensor, layout, axis) for name, tensor in whole(i).items()}
            saver.save(i, {"weights": dict(tensors), "ema": dict(tensors)}, {"layout": layout})
    assert saver.saved() == folder / "checkpoint-3"
    for i in range(len(LAYOUTS)):
        found = read_checkpoint(folder / f"checkpoint-{i}")
        for layout in LAYOUTS:
            targets = {name: lay_out(torch.zeros_like(tensor), layout, axis) for name, tensor in whole().items()}
            found.load_into("weights", targets)
            for name, tensor in whole(i).items():
                assert torch.equal(gathered(targets[name]), tensor), (i, layout, name)


def training_goes_on_while_saving(folder: Path, axis: DeviceMesh, world: World, all_gather: AllGather) -> None:
    """Its collectives and those of the saver's thread do not meet; what training changes does not show."""
    tensor = lay_out(torch.zeros(2000, 1000), "rows", axis)
    with Saver(folder, limit=2, rank=world.rank, all_gather=all_gather) as saver:
        for step in range(1, 6):
            saver.save(step, {"weights": {"a": tensor}}, {})
            for _ in range(20):
                assert ops.mean_over_data(torch.tensor(float(world.rank)), world).item() == 0.5
            with torch.no_grad():
                tensor += 1
    assert [path.name for path in checkpoint_folders(folder)] == ["checkpoint-4", "checkpoint-5"]


def a_full_disk_of_one_is_an_error_of_all(folder: Path, axis: DeviceMesh, world: World, all_gather: AllGather) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Saver(folder, rank=world.rank, all_gather=all_gather)
    saver.save(1, {"weights": {"a": lay_out(torch.ones(4), "rows", axis)}}, {})
    saver.wait()
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    saver.save(2, {"weights": {"a": lay_out(torch.ones(1000, 1000), "rows", axis)}}, {})
    try:
        saver.wait()
    except UserError as error:
        assert "checkpoint-2 could not be written by process 1" in str(error), error
    else:
        raise AssertionError("no error")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
    saver.save(2, {"weights": {"a": lay_out(torch.ones(4), "rows", axis)}}, {})
    saver.wait()


class Training:
    """A tiny U-ViT and its optimizer in some layout, with moments that are the weights and their doubles."""

    def __init__(self, world: World, seed: int):
        torch.manual_seed(seed)
        self.world, self.unet = world, UViTT2IModel(**TINY)
        parallelize(self.unet, world)
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in self.unet.named_parameters()}
        groups = [{"params": group} for group in ops.fused_groups(self.unet.parameters())]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        init_optimizer_state(self.optimizer)
        for parameter, values in self.optimizer.state.items():
            values["exp_avg"].copy_(parameter.detach())
            values["exp_avg_sq"].copy_(2 * parameter.detach())
            values["step"] += seed

    def groups(self) -> dict[str, dict[str, Tensor]]:
        optimizer = flatten_optimizer(self.optimizer, self.names)
        return {"weights": dict(self.unet.named_parameters()), "optimizer": optimizer}

    def in_checkpoint_layout(self) -> dict[str, dict[str, Any]]:
        return {group: to_checkpoint_layout(tensors, self.world) for group, tensors in self.groups().items()}

    def load(self, found: Checkpoint) -> None:
        for group, tensors in self.groups().items():
            targets = to_checkpoint_layout(tensors, self.world)
            found.load_into(group, targets)
            from_checkpoint_layout(tensors, targets, self.world)


def networks_in_every_layout(folder: Path, name: str, world: World, all_gather: AllGather) -> None:
    """Writes the weights of seed 7, and reads in this layout those that one process wrote, of seed 7."""
    training = Training(world, seed=7)
    with Saver(folder / name, rank=world.rank, all_gather=all_gather) as saver:
        saver.save(1, training.in_checkpoint_layout(), {"degrees": str(world.degrees)})
    other = Training(world, seed=8)
    other.load(read_checkpoint(folder / "one" / "checkpoint-1"))
    for group, tensors in training.groups().items():
        found = other.groups()[group]
        for key, tensor in tensors.items():
            assert torch.equal(ops.local_tensor(found[key]), ops.local_tensor(tensor)), (name, group, key)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=int(sys.argv[2]), world_size=2)
    world = mesh.init_distributed(NETWORKS["sharded"], "cpu")
    assert world.mesh is not None
    axis, all_gather = world.mesh["shard"], all_gather_channel(world)
    every_layout_reads_every_other(folder / "layouts", axis, world, all_gather)
    training_goes_on_while_saving(folder / "async", axis, world, all_gather)
    a_full_disk_of_one_is_an_error_of_all(folder / "full", axis, world, all_gather)
    for name, degrees in NETWORKS.items():
        networks_in_every_layout(folder, name, mesh.init_distributed(degrees, "cpu"), all_gather)
    mesh.destroy_distributed(world)


if __name__ == "__main__":
    main()
