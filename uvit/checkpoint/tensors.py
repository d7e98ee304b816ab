"""Tensors in safetensors files to which every process writes the slices that it holds.

A process holds a tensor whole, or one slice of it (a DTensor), or several (`LocalSlices`, for layouts that DTensor
cannot express). The header of a file says where in its tensor each slice belongs. A whole tensor is stored without such
an entry, as any other program would store it. So any layout of processes can read what another layout wrote: each
process reads what overlaps with its own slices.

Why not torch.distributed.checkpoint: its metadata is a pickle. Its safetensors storage has no metadata, so a tensor
whose last file is missing would be read as a smaller tensor.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uvit.errors import UserError

SLICES = "pieces"  # the key in a file's header of {key: [name, whole shape, offset]}, for slices


@dataclass(frozen=True)
class LocalSlice:
    """A slice of a tensor. `tensor` is the memory that the process works with: loading copies into it."""

    offset: tuple[int, ...]  # of its first element in the whole tensor
    tensor: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(frozen=True)
class LocalSlices:
    """The slices of a tensor that one process holds."""

    shape: tuple[int, ...]  # of the whole tensor
    slices: tuple[LocalSlice, ...]


@dataclass(frozen=True)
class SliceKey:
    """Which slice of which tensor."""

    group: str  # of tensors: weights, ema, optimizer
    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return self.size == self.shape


# Group (weights, ema, optimizer) -> name -> what this process holds.
Groups = Mapping[str, Mapping[str, Tensor | LocalSlices]]


def local_slices(value: Tensor | LocalSlices) -> LocalSlices:
    """The slices that this process holds of a tensor, a DTensor or `LocalSlices`. Copies nothing."""
    if isinstance(value, LocalSlices):
        return value
    value = value.detach()
    shape = tuple(value.shape)
    if not hasattr(value, "placements"):  # isinstance would import DTensor, which takes most of a second
        return LocalSlices(shape, (LocalSlice((0,) * len(shape), value),))
    dtensor: Any = value
    offset, local = local_offset(dtensor), dtensor.to_local()
    return LocalSlices(shape, (LocalSlice(offset, local),))


def local_offset(tensor: Any) -> tuple[int, ...]:
    """The offset of a DTensor's local tensor, which must be one contiguous block."""
    sizes, coordinate = tensor.device_mesh.shape, tensor.device_mesh.get_coordinate()
    cuts = {axis: placement for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()}
    offset, size = [0] * tensor.ndim, list(tensor.shape)
    # A strided shard is cut after those to its right: fully sharded after tensor parallel, along the same dim.
    for axis in sorted(cuts, key=lambda axis: hasattr(cuts[axis], "split_factor")):
        dim = cuts[axis].dim
        before = math.prod(sizes[other] for other in cuts if other > axis and cuts[other].dim == dim)
        assert getattr(cuts[axis], "split_factor", before) == before, f"{tensor.placements}: not one block"
        chunk = -(-size[dim] // sizes[axis])
        start = min(size[dim], chunk * coordinate[axis])
        offset[dim] += start
        size[dim] = min(chunk, size[dim] - start)
    local = tuple(tensor.to_local().shape)
    assert local == tuple(size), f"{tensor.placements}: a local tensor of {local} where {tuple(size)} was expected"
    return tuple(offset)


def slices_by_key(tensors: Groups) -> dict[SliceKey, Tensor]:
    """All slices that this process holds."""
    found = {}
    for group, values in tensors.items():
        for name, value in values.items():
            local = local_slices(value)
            for part in local.slices:
                if part.tensor.numel() or not math.prod(local.shape):  # a process may hold an empty slice
                    found[SliceKey(group, name, local.shape, part.offset, part.size)] = part.tensor
    return found


def assign_writers(keys_by_rank: list[list[SliceKey]]) -> list[dict[str, list[SliceKey]]]:
    """The slices that each process holds -> for each process, the files that it writes and the slices in them.

    The first process that holds a slice writes it. A group that one process writes is one plain file.
    """
    writer: dict[SliceKey, int] = {}
    for rank, keys in enumerate(keys_by_rank):
        for key in keys:
            writer.setdefault(key, rank)
    elements: dict[tuple[str, str], int] = {}
    for key in writer:
        tensor = (key.group, key.name)
        elements[tensor] = elements.get(tensor, 0) + math.prod(key.size)
    by_group: dict[str, dict[int, list[SliceKey]]] = {}
    for key, rank in writer.items():
        total = elements[key.group, key.name]
        assert total == math.prod(key.shape), f"{key.name} {key.shape}: {total} elements among all processes"
        by_group.setdefault(key.group, {}).setdefault(rank, []).append(key)
    written: list[dict[str, list[SliceKey]]] = [{} for _ in keys_by_rank]
    for group, by_rank in by_group.items():
        for i, rank in enumerate(sorted(by_rank), start=1):
            name = group if len(by_rank) == 1 else f"{group}-{i:05d}-of-{len(by_rank):05d}"
            written[rank][f"{name}.safetensors"] = by_rank[rank]
    return written


def write_slices(path: Path, tensors: dict[SliceKey, Tensor]) -> str:
    """Write one file from tensors on the CPU. Returns its SHA-256. Raises OSError or SafetensorError."""
    content, header = {}, {}
    for key, tensor in tensors.items():
        name = key.name if key.whole else f"{key.name}[{','.join(map(str, key.offset))}]"
        content[name] = tensor
        if not key.whole:
            header[name] = [key.name, key.shape, key.offset]
    save_file(content, path, metadata={SLICES: json.dumps(header)} if header else None)
    return _sha256_of(path, content)


def _sha256_of(path: Path, content: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a file that was just written: its header is read back, the tensors are hashed in memory.

    So it is that of what was meant to be written, whatever the disk made of it.
    """
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
    digest = hashlib.sha256(start + header)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
    for name in sorted(places, key=places.__getitem__):
        digest.update(content[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_whole(paths: Iterable[Path], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of these files, each whole."""
    paths = list(paths)
    tensors = {}
    for path in paths:
        for name, shape, _, stored in stored_slices(path):
            if name not in tensors:
                dtype = stored[(slice(0, 0),) * len(stored.get_shape())].dtype
                tensors[name] = torch.empty(shape, dtype=dtype, device=device)
    read_into(paths, tensors)
    return tensors


@torch.no_grad()
def read_into(paths: Iterable[Path], targets: Mapping[str, Tensor | LocalSlices]) -> None:
    """Fill `targets`, in any layout of processes, with the tensors of these files.

    Raises UserError if a file cannot be read or holds other tensors. Some targets may be filled by then.
    """
    paths = list(paths)
    wanted = {name: local_slices(value) for name, value in targets.items()}
    missing = {name: sum(part.tensor.numel() for part in local.slices) for name, local in wanted.items()}
    found = set()
    for path in paths:
        for name, shape, offset, stored in stored_slices(path):
            found.add(name)
            if name not in wanted:
                raise UserError(
                    f"{path}: has a tensor {name} that this run does not have; it is of another model or setting"
                )
            if shape != wanted[name].shape:
                raise UserError(
                    f"{path}: {name} is {shape} there and {wanted[name].shape} here; it is of another model"
                )
            for part in wanted[name].slices:
                both = overlap(offset, tuple(stored.get_shape()), part.offset, part.size)
                if both:
                    source, target = stored[both[0]], part.tensor[both[1]]
                    if source.dtype != target.dtype:
                        raise UserError(f"{path}: {name} is {source.dtype} there and {target.dtype} here")
                    target.copy_(source)
                    missing[name] -= source.numel()
    for name, number in missing.items():
        if number or name not in found:
            where = ", ".join(path.name for path in paths)
            raise UserError(f"{paths[0].parent}: {name} is missing or incomplete in {where}; use another checkpoint")


def stored_slices(path: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """The name, whole shape, offset and safetensors slice of each entry of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_slice(key)
                size = tuple(stored.get_shape())
                name, shape, offset = header.get(key, (key, size, (0,) * len(size)))
                if not len(shape) == len(offset) == len(size):
                    raise ValueError(f"{name}: shape {shape}, offset {offset}, size {size}")
                yield name, tuple(shape), tuple(offset), stored
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None


def overlap(
    offset: tuple[int, ...], size: tuple[int, ...], other_offset: tuple[int, ...], other_size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two slices of a tensor overlap, as indices into each of them; None if they do not."""
    starts = [max(a, b) for a, b in zip(offset, other_offset, strict=True)]
    stops = [min(a + n, b + m) for a, n, b, m in zip(offset, size, other_offset, other_size, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    spans = list(zip(starts, stops, strict=True))
    here = tuple(slice(start - a, stop - a) for (start, stop), a in zip(spans, offset, strict=True))
    there = tuple(slice(start - b, stop - b) for (start, stop), b in zip(spans, other_offset, strict=True))
    return here, there
