"""Gradients, norms, flags and replicas, over processes and in one."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.distributed.conftest import OF_FOUR, OF_TWO, Worlds
from uvit.distributed import ops
from uvit.distributed.mesh import World

LAYOUTS = [*OF_TWO, *OF_FOUR]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_and_flags_agree_in_all_processes(worlds: Worlds, layout: str) -> None:
    dp, shard, _ = map(int, layout.split("x"))
    wanted = {
        "mean": (dp * shard - 1) / 2,
        "any": [True, False],
        "late": [False, True, False],
        "from_main": {"rank": 0},
    }
    assert all(found["numbers"] == wanted for found in worlds.checks(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_main_process_fails_the_others_do_not_wait(worlds: Worlds, layout: str) -> None:
    main, *others = [found["failures"] for found in worlds.checks(layout)]
    assert main == [["UserError", "--flag: no"], ["OSError", "[Errno 28] No space"]]
    told = "process 0 failed: OSError(28, 'No space')"
    assert others == [[["UserError", "--flag: no"], ["UserError", told]]] * len(others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_in_one_process_is_known_to_all(worlds: Worlds, layout: str) -> None:
    assert all(found["infinite"] == [True, False] for found in worlds.checks(layout))


@pytest.mark.parametrize("layout", ["2x1x1", "2x1x2"])
def test_parameters_without_a_gradient_stay_without(worlds: Worlds, layout: str) -> None:
    assert all(found["unused"] == [0.5, None] for found in worlds.checks(layout))


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("2x1x1", [[], ["pos_embed"], ["pos_embed", "mid_block.attn.qkv.weight"]]),
        ("1x2x1", [[], [], []]),  # all parts, no replica
        ("1x1x2", [[], ["pos_embed"], ["pos_embed"]]),
        ("2x1x2", [[], ["pos_embed"], ["pos_embed", "mid_block.attn.qkv.weight"]]),
        ("1x2x2", [[], ["pos_embed"], ["pos_embed"]]),
        ("2x2x1", [[], ["pos_embed"], ["pos_embed", "mid_block.attn.qkv.weight"]]),
    ],
)
def test_a_bit_that_differs_between_replicas_is_found_everywhere(
    worlds: Worlds, layout: str, wanted: list[list[str]]
) -> None:
    assert all(found["replicas"] == wanted for found in worlds.checks(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_process_computes_a_part_and_all_have_the_whole(worlds: Worlds, layout: str) -> None:
    found = [check["in_parts"] for check in worlds.checks(layout)]
    assert all(member[1::2] == [True] * 3 for member in found)
    shares = {2: [[1, 0], [3, 2], [4, 4]], 4: [[1, 0, 0, 0], [2, 2, 1, 0], [2, 2, 2, 2]]}[len(found)]
    assert [[member[2 * i] for member in found] for i in range(3)] == shares


def test_in_a_world_of_one_nothing_is_asked_of_others(alone: World) -> None:
    assert ops.mean_over_data(torch.tensor(3.0), alone).item() == 3
    assert [ops.any_of(True, alone), ops.any_of(False, alone)] == [True, False]
    late = ops.LateFlag(alone)
    assert [late(True), late(False)] == [True, False]
    assert ops.broadcast("x", alone) == "x"
    assert ops.differing_replicas({"x": torch.zeros(2)}, alone) == []
    ops.barrier(alone)


def test_norm_and_clipping_are_torch_s(alone: World) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 40)] for _ in range(2))
    for parameter, other in zip(ours, theirs, strict=True):
        parameter.grad = torch.randn(parameter.shape)
        other.grad = parameter.grad.clone()
    norm = ops.GradientNorm([*ours, nn.Parameter(torch.zeros(1))], alone)()
    ops.clip_gradients(ours, 0.5, norm)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    for parameter, other in zip(ours, theirs, strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]
    ops.clip_gradients(ours, 100.0, ops.GradientNorm(ours, alone)())
    assert torch.equal(ours[0].grad, theirs[0].grad)  # type: ignore[arg-type]


def test_plain_parameters_are_one_fused_group() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 40)]
    (group,) = ops.fused_groups(parameters)
    assert [id(parameter) for parameter in group] == [id(parameter) for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("checksum", [ops.digest, ops.sum_of_bits])
def test_checksums_tell_bits_and_places_apart(
    checksum: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "DIGEST_ELEMENTS", 7)  # 15 elements in three parts
    one = torch.arange(15).to(dtype)
    found = [checksum(one).item(), checksum(one.flip(0)).item(), checksum(one.roll(1)).item()]
    for place in range(15):
        other = one.clone()
        other.view(torch.uint8)[place * other.element_size()] ^= 1
        found.append(checksum(other).item())
    assert checksum(one.clone()) == found[0]
    assert len(set(found)) == len(found)


def test_a_checksum_counts_the_sign_of_zero() -> None:
    zeros = torch.zeros(15)
    assert ops.digest(zeros) != ops.digest(-zeros) and ops.sum_of_bits(zeros) != ops.sum_of_bits(-zeros)
