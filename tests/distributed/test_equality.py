"""One process equals replicas, shards, tensor parallelism and their combinations: 4 AdamW steps of the same batches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.distributed.conftest import OF_FOUR, OF_TWO, Worlds
from tests.distributed.worker import tiny

Trained = Callable[[str], dict[str, Tensor]]
EVERY = [(layout, case) for layouts in (OF_TWO, OF_FOUR) for layout, cases in layouts.items() for case in cases]
EXACT = [(layout, case) for layout, case in EVERY if case not in ("bf16", "copy")]
LOW_PRECISION = [(layout, case) for layout, case in EVERY if case in ("bf16", "copy")]


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The 2-norm of the difference over all tensors of `others`, relative to them."""
    difference = torch.stack([(some[name] - tensor).norm() for name, tensor in others.items()]).norm()
    return (difference / torch.stack([tensor.norm() for tensor in others.values()]).norm()).item()


@pytest.mark.parametrize(("layout", "case"), EXACT)
def test_losses_norms_weights_average_and_moments_are_those_of_one_process(
    worlds: Worlds, trained_alone: Trained, layout: str, case: str
) -> None:
    """Sums in another order differ by float32's rounding, 6e-8; layers and 4 steps make 1e-6 of it, measured."""
    found, wanted = worlds.trained(layout, case), trained_alone(case)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for name in ("losses", "norms"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("layout", "case"), EVERY)
def test_replicas_are_still_alike_in_every_bit_after_training(worlds: Worlds, layout: str, case: str) -> None:
    assert worlds.trained(layout, case)["differing"] == 0


@pytest.mark.parametrize(("layout", "case"), LOW_PRECISION)
def test_low_precision_differs_less_between_layouts_than_from_float32(
    worlds: Worlds, trained_alone: Trained, layout: str, case: str
) -> None:
    """A bfloat16 sum in another order differs by its rounding, 2**-8: that is what the precision costs anyhow."""
    found, wanted, exact = worlds.trained(layout, case), trained_alone(case), trained_alone("plain")
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found["norms"], wanted["norms"], rtol=2**-8, atol=0)
    assert distance(found, wanted) <= distance(wanted, exact)


def test_what_is_compared_depends_on_every_step(trained_alone: Trained) -> None:
    """All that the layouts have in common is far above the tolerance: training itself, clipping, precision."""
    start = {name: parameter.detach() for name, parameter in tiny().named_parameters()}
    weights = {name: tensor for name, tensor in trained_alone("plain").items() if name in start}
    assert distance(start, weights) > 1e-2
    assert distance(trained_alone("all"), weights) > 1e-3
    assert distance(trained_alone("bf16"), weights) > 1e-4
    assert distance(trained_alone("copy"), weights) > 1e-4
