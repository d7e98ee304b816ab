"""What each process holds and computes of a network that is spread over several, and sizes that cannot be spread."""

import pytest
import torch

from tests.distributed.conftest import OF_FOUR, OF_TWO, Worlds
from tests.distributed.worker import TINY, microbatch, tiny
from uvit.distributed.mesh import Degrees, World
from uvit.distributed.parallelize import order_by_rank, parallelize
from uvit.errors import UserError
from uvit.model import UViTT2IModel

SPLIT = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight")
LAYOUTS = [*OF_TWO, *OF_FOUR]


def a_world_of(degrees: Degrees) -> World:
    """Its numbers alone."""
    return World(0, degrees.product, degrees, torch.device("cpu"), None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_process_holds_its_part(worlds: Worlds, layout: str) -> None:
    _, shard, tp = map(int, layout.split("x"))
    whole = {name: parameter.numel() for name, parameter in tiny().named_parameters()}
    for found in worlds.checks(layout):
        parts = {name: shard * (tp if name.endswith(SPLIT) else 1) for name in whole}
        assert found["held"] == {name: count // parts[name] for name, count in whole.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_inside_attention_and_mlp_are_split_over_tp(worlds: Worlds, layout: str) -> None:
    tp = int(layout.split("x")[2])
    for found in worlds.checks(layout):
        assert found["inner"] == {"qkv": [8, 24, 3 * 64 // tp], "fc1": [8, 24, 4 * 64 // tp]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_forward_without_a_backward_leaves_the_parameters_as_they_were(worlds: Worlds, layout: str) -> None:
    assert all(found["forward_alone"] for found in worlds.checks(layout))


def test_rows_ordered_by_rank_hold_the_queries_keys_and_values_of_the_rank_s_heads() -> None:
    attention = tiny().mid_block.attn
    rows = torch.arange(3 * 64.0)  # row -> (q|k|v) x heads x head_dim
    attention.qkv.weight.data = rows[:, None].repeat(1, 64)
    order_by_rank(attention.qkv.weight, 3, 2)
    first, second = attention.qkv.weight[:, 0].chunk(2)
    assert torch.equal(first, rows.view(3, 4, 16)[:, :2].flatten())
    assert torch.equal(second, rows.view(3, 4, 16)[:, 2:].flatten())


def test_in_a_world_of_one_the_network_is_left_as_it_is(alone: World) -> None:
    unet = tiny()
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    outputs = unet(*microbatch(0, 0, 1)[:3])
    parallelize(unet, alone, recompute=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())
    assert torch.equal(unet(*microbatch(0, 0, 1)[:3]), outputs)
    assert unet.gradient_checkpointing


def test_heads_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"^--tensor_parallel_degree 3: .* 4 heads and its MLPs' width of 256"):
        parallelize(tiny(), a_world_of(Degrees(tp=3)))
    with pytest.raises(UserError, match=r"^--tensor_parallel_degree 4: .* 4 heads and its MLPs' width of 254"):
        parallelize(UViTT2IModel(**TINY | {"mlp_ratio": 254 / 64}), a_world_of(Degrees(tp=4)))


def test_a_width_that_does_not_divide_is_refused_where_it_must() -> None:
    with pytest.raises(UserError, match=r"^--sharding_parallel_degree 3: does not divide .* 64 .* 256 / 2"):
        parallelize(tiny(), a_world_of(Degrees(shard=3, tp=2)))


def test_qkv_bias_is_refused_with_tensor_parallelism() -> None:
    with pytest.raises(UserError, match=r"^--tensor_parallel_degree 2: is not supported for networks with qkv_bias"):
        parallelize(UViTT2IModel(**TINY, qkv_bias=True), a_world_of(Degrees(tp=2)))
