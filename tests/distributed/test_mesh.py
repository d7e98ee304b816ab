"""Worlds of one and of several, and degrees that do not fit the number of processes."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.conftest import OF_FOUR, OF_TWO, Worlds
from uvit.distributed.mesh import Degrees, World, check_gpus, destroy_distributed, init_distributed
from uvit.errors import UserError


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As one of four processes of torchrun."""
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_world_of_one_uses_no_torch_distributed() -> None:
    world = init_distributed(Degrees(), "cpu")
    assert world == World(0, 1, Degrees(), torch.device("cpu"), None)
    assert (world.parallel, world.is_main, world.data_rank, world.num_data_ranks) == (False, True, 0, 1)
    assert world.axes() == []
    assert not dist.is_initialized()
    destroy_distributed(world)


def test_one_process_of_torchrun_is_a_world_of_one(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("RANK", "0")
    launched.setenv("WORLD_SIZE", "1")
    assert not init_distributed(Degrees(), "cpu").parallel


@pytest.mark.parametrize("layout", [*OF_TWO, *OF_FOUR])
def test_processes_of_a_tp_group_read_the_same_data(worlds: Worlds, layout: str) -> None:
    dp, shard, tp = map(int, layout.split("x"))
    places = [found["place"] for found in worlds.checks(layout)]
    assert places == [[rank // tp, dp * shard, rank % tp, rank == 0] for rank in range(dp * shard * tp)]


def test_degrees_without_torchrun_tell_the_command() -> None:
    with pytest.raises(UserError) as error:
        init_distributed(Degrees(dp=2, tp=2), "cpu")
    assert str(error.value) == (
        "--dp_degree 2 x --sharding_parallel_degree 1 x --tensor_parallel_degree 2 = 4, but there is 1 process; "
        "start them with torchrun --nproc_per_node 4 -m uvit train ..."
    )


def test_degrees_that_are_not_the_number_of_processes_tell_what_would_be(launched: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        init_distributed(Degrees(tp=2), "cpu")
    assert str(error.value) == (
        "--dp_degree 1 x --sharding_parallel_degree 1 x --tensor_parallel_degree 2 = 2, but there are 4 processes; "
        "pass --dp_degree 2, or start them with torchrun --nproc_per_node 2 -m uvit train ..."
    )
    with pytest.raises(UserError, match=r"= 1, but there are 4 processes; pass --dp_degree 4, or start one without"):
        init_distributed(Degrees(), "cpu")
    with pytest.raises(UserError, match=r"= 3, but there are 4 processes; start them with torchrun --nproc_per_node 3"):
        init_distributed(Degrees(shard=3), "cpu")
    assert not dist.is_initialized()


def test_processes_that_would_share_a_gpu_are_named() -> None:
    check_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", "GPU-2")], "auto")
    with pytest.raises(UserError) as error:
        check_gpus([("a", "GPU-1"), ("a", "GPU-1"), ("b", "GPU-1")], "cuda:0")
    assert str(error.value) == (
        "--device cuda:0: processes 0 and 1 would share a GPU of a, which NCCL does not allow; pass --device cuda, and "
        "start as many processes on it as it has GPUs, not 2"
    )


@pytest.mark.parametrize("layout", [*OF_TWO, *OF_FOUR])
def test_time_limits_hold_for_every_group(worlds: Worlds, layout: str) -> None:
    """Long until the first step; afterwards still well above --hang_timeout."""
    for found in worlds.checks(layout):
        assert set(found["timeouts"][0]) == {3600.0}
        assert set(found["timeouts"][1]) == {1800.0}
        assert set(found["timeouts"][2]) == {7200.0}


@pytest.mark.parametrize("degrees", [Degrees(dp=0), Degrees(dp=-2, shard=-2)])
def test_degrees_below_one_are_refused(launched: pytest.MonkeyPatch, degrees: Degrees) -> None:
    with pytest.raises(UserError, match=rf"^--dp_degree {degrees.dp}: must be 1 or more$"):
        init_distributed(degrees, "cpu")
