"""Slices that any layout of processes wrote can be read by any other."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from uvit.checkpoint import tensors as checkpoint_tensors
from uvit.checkpoint.tensors import LocalSlice, LocalSlices, SliceKey
from uvit.errors import UserError


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(6, 4), (5, 3, 2), (7,), (), (0, 3)]
    return {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def boxes(shape: tuple[int, ...], cuts: dict[int, list[int]]) -> Iterator[tuple[slice, ...]]:
    """The boxes that cuts of some dims leave of a shape."""
    result: list[tuple[slice, ...]] = [()]
    for dim, length in enumerate(shape):
        edges = sorted({0, length, *(min(cut, length) for cut in cuts.get(dim, []))})
        spans = [slice(a, b) for a, b in itertools.pairwise(edges)] or [slice(0, 0)]
        result = [(*box, span) for box in result for span in spans]
    return iter(result)


def deal(tensor: Tensor, cuts: dict[int, list[int]], num_processes: int) -> list[LocalSlices]:
    """A tensor's boxes, dealt out to processes in turn, as views."""
    hands: list[list[LocalSlice]] = [[] for _ in range(num_processes)]
    for i, box in enumerate(boxes(tuple(tensor.shape), cuts)):
        hands[i % num_processes].append(LocalSlice(tuple(span.start for span in box), tensor[box]))
    return [LocalSlices(tuple(tensor.shape), tuple(hand)) for hand in hands]


def write_all(folder: Path, processes: list[dict[str, LocalSlices]]) -> list[Path]:
    held = [checkpoint_tensors.slices_by_key({"weights": process}) for process in processes]
    for mine, files in zip(held, checkpoint_tensors.assign_writers([list(places) for places in held]), strict=True):
        for name, places in files.items():
            checkpoint_tensors.write_slices(folder / name, {place: mine[place].contiguous() for place in places})
    return sorted(folder.glob("*.safetensors"))


layouts = st.tuples(
    st.dictionaries(st.integers(0, 2), st.lists(st.integers(0, 7), max_size=3), max_size=3), st.integers(1, 4)
)


@given(layouts, layouts)
def test_any_layout_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, one: tuple[dict[int, list[int]], int], other: tuple[dict, int]
) -> None:
    tensors = whole()
    dealt = {name: deal(tensor, *one) for name, tensor in tensors.items()}
    folder = tmp_path_factory.mktemp("files")
    paths = write_all(folder, [{name: hands[rank] for name, hands in dealt.items()} for rank in range(one[1])])
    for name, tensor in checkpoint_tensors.read_whole(paths).items():
        assert torch.equal(tensor, tensors[name])
    goals = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    targets = {name: deal(goal, *other) for name, goal in goals.items()}
    for rank in range(other[1]):
        checkpoint_tensors.read_into(paths, {name: hands[rank] for name, hands in targets.items()})
    assert all(torch.equal(goals[name], tensor) for name, tensor in tensors.items())


def test_a_whole_tensor_is_stored_as_anybody_would(tmp_path: Path) -> None:
    tensors = whole()
    [path] = write_all(tmp_path, [{name: checkpoint_tensors.local_slices(tensor) for name, tensor in tensors.items()}])
    assert path.name == "weights.safetensors"
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)


def places(rank: int, rows: int = 4) -> list[SliceKey]:
    """A matrix cut by rows over 2 x 2 processes, of which 0 and 2, 1 and 3 are replicas, and a vector that all have."""
    start = rank % 2 * rows // 2
    return [
        SliceKey("weights", "matrix", (rows, 3), (start, 0), (rows // 2, 3)),
        SliceKey("weights", "vector", (3,), (0,), (3,)),
        SliceKey("ema", "vector", (3,), (0,), (3,)),
    ]


def test_replicas_are_written_once_and_shards_by_their_processes() -> None:
    written = checkpoint_tensors.assign_writers([places(rank) for rank in range(4)])
    first, second, third, fourth = written
    assert list(first) == ["weights-00001-of-00002.safetensors", "ema.safetensors"]
    assert list(second) == ["weights-00002-of-00002.safetensors"]
    assert not third and not fourth
    assert [place.name for place in second["weights-00002-of-00002.safetensors"]] == ["matrix"]
    elements = [math.prod(p.size) for files in written for found in files.values() for p in found]
    assert sum(elements) == 12 + 3 + 3


def test_a_tensor_with_a_hole_is_not_written() -> None:
    with pytest.raises(AssertionError, match=r"matrix \(4, 3\): 6 elements"):
        checkpoint_tensors.assign_writers([places(0), places(0)])


def test_a_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(4, 3)
    paths = write_all(tmp_path, [{"matrix": hand} for hand in deal(matrix, {0: [2]}, 2)])
    assert len(paths) == 2
    with pytest.raises(UserError, match=r"matrix is missing or incomplete in weights-00001-of-00002.safetensors"):
        checkpoint_tensors.read_whole(paths[:1])
    checkpoint_tensors.read_into(paths[:1], {"matrix": deal(matrix, {0: [2]}, 2)[0]})  # all that this process needs


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "has a tensor a that this run does not have"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "b is missing or incomplete in"),
        ({"a": torch.zeros(3, 2)}, r"a is \(2, 3\) there and \(3, 2\) here"),
        ({"a": torch.zeros(2, 3, dtype=torch.float16)}, r"a is torch.float32 there and torch.float16 here"),
    ],
)
def test_other_tensors_than_stored_are_refused(tmp_path: Path, targets: dict[str, Tensor], message: str) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        checkpoint_tensors.read_into([tmp_path / "weights.safetensors"], targets)


@pytest.mark.parametrize(
    "header",
    ["{", "[]", '{"a": 3}', '{"a": ["a", [2, 3], [0]]}', '{"a": ["a", [2, 3], [9, 9]]}', '{"a": ["a", [9], [0]]}'],
)
def test_a_header_that_makes_no_sense_is_a_sentence(tmp_path: Path, header: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2, 3)}, path, metadata={"pieces": header})
    with pytest.raises(UserError, match=r"weights.safetensors"):
        checkpoint_tensors.read_into([path], {"a": torch.zeros(2, 3)})


def test_a_parameter_is_loaded_in_place(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(2))
    checkpoint_tensors.read_into([tmp_path / "weights.safetensors"], {"a": parameter})
    assert (parameter == 1).all() and parameter.requires_grad and parameter.grad_fn is None


@pytest.mark.parametrize("place", range(8))
def test_boxes_are_where_dtensor_has_them(place: int) -> None:
    """On a mesh of 8 processes of which none talks; also for what fully sharded makes of tensor parallel."""
    ranks = torch.arange(8).roll(place).reshape(2, 2, 2)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "shard", "tp"), _init_backend=False, _rank=0)

    def laid_out(shape: tuple[int, ...], size: tuple[int, ...], placements: tuple[Placement, ...]) -> DTensor:
        stride = torch.empty(shape).stride()
        return DTensor.from_local(
            torch.zeros(size), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    for shape, placements in [
        ((5, 3), (Replicate(), Shard(0), Shard(1))),
        ((1, 7), (Shard(1), Shard(1), Replicate())),
        ((8,), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
        ((4, 4), (Replicate(), Shard(1), Shard(0))),
    ]:
        size, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
        [part] = checkpoint_tensors.local_slices(laid_out(shape, size, placements)).slices
        assert part.size == size
        assert part.offset == offset or not part.tensor.numel(), placements
    with pytest.raises(AssertionError, match="not one block"):
        checkpoint_tensors.local_slices(laid_out((8,), (2,), (Replicate(), _StridedShard(0, split_factor=4), Shard(0))))
