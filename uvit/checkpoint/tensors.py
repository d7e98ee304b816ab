"""Tensors in safetensors files, of which every process writes the pieces that it holds.

A process holds a tensor whole, or a box of it (a DTensor), or several boxes (`Pieces`, for layouts that DTensor has no
word for). A file's header says where in its tensor a piece belongs; a tensor that is whole is stored as anybody would
store it. So files that one layout of processes wrote can be read by any other: each process takes what overlaps.

Not torch.distributed.checkpoint: its own metadata is a pickle, and its safetensors storage has none, so that there a
tensor whose last file is missing passes for a smaller one.
"""

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

SLICES = "pieces"  # in a file's header: {key: [name, whole shape, offset]} of what is not whole


@dataclass(frozen=True)
class LocalSlice:
    """A box of a tensor. `tensor` is the memory that the process works with: loading copies into it."""

    offset: tuple[int, ...]  # of its first element in the whole tensor
    tensor: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(frozen=True)
class LocalSlices:
    """What one process holds of a tensor."""

    shape: tuple[int, ...]  # of the whole tensor
    pieces: tuple[LocalSlice, ...]


@dataclass(frozen=True)
class SliceKey:
    """Where a piece belongs."""

    group: str  # of tensors: weights, ema, optimizer
    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return self.size == self.shape


# Of weights, ema, optimizer: names, and what this process holds.
Groups = Mapping[str, Mapping[str, Tensor | LocalSlices]]


def local_slices(value: Tensor | LocalSlices) -> LocalSlices:
    """What this process holds of a tensor, a DTensor or `Pieces`, without copying."""
    if isinstance(value, LocalSlices):
        return value
    value = value.detach()
    shape = tuple(value.shape)
    if not hasattr(value, "placements"):  # importing DTensor to ask costs most of a second
        return LocalSlices(shape, (LocalSlice((0,) * len(shape), value),))
    dtensor: Any = value
    offset, local = local_offset(dtensor), dtensor.to_local()
    return LocalSlices(shape, (LocalSlice(offset, local),))


def local_offset(tensor: Any) -> tuple[int, ...]:
    """The offset of a DTensor's local part, which must be one box."""
    sizes, coordinate = tensor.device_mesh.shape, tensor.device_mesh.get_coordinate()
    cuts = {axis: placement for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()}
    offset, size = [0] * tensor.ndim, list(tensor.shape)
    # A strided cut comes after those to its right: fully sharded after tensor parallel, of the same dim.
    for axis in sorted(cuts, key=lambda axis: hasattr(cuts[axis], "split_factor")):
        dim = cuts[axis].dim
        before = math.prod(sizes[other] for other in cuts if other > axis and cuts[other].dim == dim)
        assert getattr(cuts[axis], "split_factor", before) == before, f"{tensor.placements}: not one box"
        chunk = -(-size[dim] // sizes[axis])
        start = min(size[dim], chunk * coordinate[axis])
        offset[dim] += start
        size[dim] = min(chunk, size[dim] - start)
    local = tuple(tensor.to_local().shape)
    assert local == tuple(size), f"{tensor.placements}: a local part of {local} where {tuple(size)} was expected"
    return tuple(offset)


def slices_by_key(tensors: Groups) -> dict[SliceKey, Tensor]:
    """What this process holds, by where it belongs."""
    found = {}
    for group, values in tensors.items():
        for name, value in values.items():
            held = local_slices(value)
            for piece in held.pieces:
                if piece.tensor.numel() or not math.prod(held.shape):  # a process may have come away empty-handed
                    found[SliceKey(group, name, held.shape, piece.offset, piece.size)] = piece.tensor
    return found


def assign_writers(held: list[list[SliceKey]]) -> list[dict[str, list[SliceKey]]]:
    """What each process holds -> what each process writes: file names and their places.

    The first process that holds a piece writes it. A group that one process writes is one plain file.
    """
    writer: dict[SliceKey, int] = {}
    for rank, places in enumerate(held):
        for place in places:
            writer.setdefault(place, rank)
    filled: dict[tuple[str, str], int] = {}
    for place in writer:
        key = (place.group, place.name)
        filled[key] = filled.get(key, 0) + math.prod(place.size)
    by_group: dict[str, dict[int, list[SliceKey]]] = {}
    for place, rank in writer.items():
        there = filled[place.group, place.name]
        assert there == math.prod(place.shape), f"{place.name} {place.shape}: {there} elements among all processes"
        by_group.setdefault(place.group, {}).setdefault(rank, []).append(place)
    written: list[dict[str, list[SliceKey]]] = [{} for _ in held]
    for group, by_rank in by_group.items():
        for i, rank in enumerate(sorted(by_rank), start=1):
            name = group if len(by_rank) == 1 else f"{group}-{i:05d}-of-{len(by_rank):05d}"
            written[rank][f"{name}.safetensors"] = by_rank[rank]
    return written


def write_slices(path: Path, tensors: dict[SliceKey, Tensor]) -> None:
    """Raises OSError or SafetensorError where it cannot."""
    content, placed = {}, {}
    for place, tensor in tensors.items():
        key = place.name if place.whole else f"{place.name}[{','.join(map(str, place.offset))}]"
        content[key] = tensor
        if not place.whole:
            placed[key] = [place.name, place.shape, place.offset]
    save_file(content, path, metadata={SLICES: json.dumps(placed)} if placed else None)


def read_whole(paths: Iterable[Path], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of these files, put together."""
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
    """Fill `targets`, in whatever layout, with the tensors of these files.

    Raises UserError where a file cannot be read, or holds other tensors than these; targets may be half filled then.
    """
    paths = list(paths)
    wanted = {name: local_slices(value) for name, value in targets.items()}
    missing = {name: sum(piece.tensor.numel() for piece in held.pieces) for name, held in wanted.items()}
    known = set()
    for path in paths:
        for name, shape, offset, stored in stored_slices(path):
            known.add(name)
            if name not in wanted:
                raise UserError(f"{path}: holds {name}, which this run has not; it is of another model or setting")
            if shape != wanted[name].shape:
                raise UserError(
                    f"{path}: {name} is {shape} there and {wanted[name].shape} here; it is of another model"
                )
            for piece in wanted[name].pieces:
                both = overlap(offset, tuple(stored.get_shape()), piece.offset, piece.size)
                if both:
                    source, goal = stored[both[0]], piece.tensor[both[1]]
                    if source.dtype != goal.dtype:
                        raise UserError(f"{path}: {name} is {source.dtype} there and {goal.dtype} here")
                    goal.copy_(source)
                    missing[name] -= source.numel()
    for name, number in missing.items():
        if number or name not in known:
            where = ", ".join(path.name for path in paths)
            raise UserError(f"{paths[0].parent}: {name} is not or not wholly in {where}; use another checkpoint")


def stored_slices(path: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """Name, whole shape, offset and slice (safetensors' own) of all that a file holds."""
    try:
        with safe_open(path, framework="pt") as file:
            placed = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_slice(key)
                size = tuple(stored.get_shape())
                name, shape, offset = placed.get(key, (key, size, (0,) * len(size)))
                if not len(shape) == len(offset) == len(size):
                    raise ValueError(f"{name}: shape {shape}, offset {offset}, size {size}")
                yield name, tuple(shape), tuple(offset), stored
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None


def overlap(
    offset: tuple[int, ...], size: tuple[int, ...], other_offset: tuple[int, ...], other_size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes overlap, as slices of each of them; None where they do not."""
    starts = [max(a, b) for a, b in zip(offset, other_offset, strict=True)]
    stops = [min(a + n, b + m) for a, n, b, m in zip(offset, size, other_offset, other_size, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    spans = list(zip(starts, stops, strict=True))
    here = tuple(slice(start - a, stop - a) for (start, stop), a in zip(spans, offset, strict=True))
    there = tuple(slice(start - b, stop - b) for (start, stop), b in zip(spans, other_offset, strict=True))
    return here, there
