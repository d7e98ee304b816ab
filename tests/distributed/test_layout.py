"""A tensor in checkpoint layout is the same for every layout of processes: name, shape, order of rows."""

import pytest
import torch

from tests.distributed.conftest import OF_FOUR, OF_TWO, Worlds
from tests.distributed.whole import full
from tests.distributed.worker import tiny
from uvit.checkpoint.layout import from_checkpoint_layout, to_checkpoint_layout
from uvit.distributed.mesh import World

LAYOUTS = [*OF_TWO, *OF_FOUR]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_full_weights_are_those_that_were_spread_and_lie_in_the_main_process(worlds: Worlds, layout: str) -> None:
    main, *others = [set(found["full"]) for found in worlds.checks(layout)]
    assert main == set()
    assert all(missing == {name for name, _ in tiny().named_parameters()} for missing in others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_a_plain_tensor_fill_the_checkpoint_layout(worlds: Worlds, layout: str) -> None:
    assert all(found["loaded"] == [] for found in worlds.checks(layout))


def test_in_a_world_of_one_tensors_are_handed_on(alone: World) -> None:
    tensors = {"a/mid_block.attn.qkv.weight": torch.randn(12, 4), "step/x": torch.tensor(3.0)}
    target = to_checkpoint_layout(tensors, alone)
    assert all(target[name] is tensor for name, tensor in tensors.items())
    whole = full(tensors, alone)
    from_checkpoint_layout(tensors, {name: tensor + 1 for name, tensor in tensors.items()}, alone)
    assert all(torch.equal(tensors[name], tensor + 1) for name, tensor in whole.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_main_process_writes_whole_averages(worlds: Worlds, layout: str) -> None:
    assert all(found["snapshot"] == [] for found in worlds.checks(layout))
