"""Precision and recall equal the reference to the last image, whatever the tiles; copies are inside."""

import pytest
import torch

from tests.evaluate.reference import EXPECTED, feature_sets
from uvit.errors import UserError
from uvit.evaluate import feature_sets as tiling
from uvit.evaluate.neighbours import precision_recall_density_coverage

CASES = [(name, int(k)) for name, values in EXPECTED["precision_recall"].items() for k in values]


@pytest.mark.parametrize(("name", "k"), CASES)
@pytest.mark.parametrize("rows", [64, 2048])
def test_it_equals_torch_fidelity(name: str, k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_ROWS", rows)
    found = precision_recall_density_coverage(*feature_sets(name), k)
    assert [found.precision, found.recall] == EXPECTED["precision_recall"][name][str(k)]


@pytest.mark.parametrize("rows", [5, 2048])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_is_the_definition(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_ROWS", rows)
    generator = torch.Generator().manual_seed(k)
    generated = torch.randint(0, 4, (40, 3), generator=generator).double()  # many equal distances and copies
    reference = torch.randint(0, 4, (30, 3), generator=generator).double()

    def radii(x: torch.Tensor) -> torch.Tensor:
        squares = (x[:, None] - x).square().sum(2)
        squares.fill_diagonal_(torch.inf)
        return squares.sort(1).values[:, k - 1]

    squares = (reference[:, None] - generated).square().sum(2)  # exact: whole numbers
    in_reference, in_generated = squares <= radii(reference)[:, None], squares <= radii(generated)
    found = precision_recall_density_coverage(generated, reference, k)
    assert found.precision == pytest.approx(in_reference.any(0).double().mean().item())
    assert found.recall == pytest.approx(in_generated.any(1).double().mean().item())
    assert found.density == pytest.approx(in_reference.double().sum(0).mean().item() / k)
    assert found.coverage == pytest.approx(in_reference.any(1).double().mean().item())


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_copies_are_inside_however_far_from_zero(offset: float) -> None:
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double().repeat_interleave(5, 0) + offset
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    found = precision_recall_density_coverage(rows[order], rows, k=3)  # every radius is 0
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(5 / 3)


def test_sets_far_apart_and_equal_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 4, generator=generator), torch.randn(300, 4, generator=generator)
    near, far = precision_recall_density_coverage(x, y), precision_recall_density_coverage(x, y + 50)
    assert near.precision > 0.9 and near.recall > 0.9 and near.coverage > 0.9
    assert near.density == pytest.approx(1, abs=0.15)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"with 5 neighbours: needs at least 6 generated images, and there are 5"):
        precision_recall_density_coverage(torch.zeros(5, 2), torch.zeros(9, 2))
    with pytest.raises(UserError, match=r"k = 0 neighbours; use 1 or more"):
        precision_recall_density_coverage(torch.zeros(5, 2), torch.zeros(9, 2), k=0)
    with pytest.raises(UserError, match=r"2 features each and the reference 3"):
        precision_recall_density_coverage(torch.zeros(9, 2), torch.zeros(9, 3))
