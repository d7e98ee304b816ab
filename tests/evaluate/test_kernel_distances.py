"""KID and CMMD equal the reference; tiles do not matter; intervals cover."""

import numpy as np
import pytest
import torch

from tests.evaluate.reference import EXPECTED, feature_sets, tensor
from uvit.errors import UserError
from uvit.evaluate import feature_sets as tiling
from uvit.evaluate.kernel_distances import cmmd, kid, kid_interval, kid_of_subsets

RUNS = [(name, i) for name, value in EXPECTED["kid"].items() for i in range(len(value["subset_runs"]))]


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_kid_of_subsets_equals_torch_fidelity(name: str, run: int) -> None:
    values = EXPECTED["kid"][name]["subset_runs"][run]
    found = kid_of_subsets(
        *feature_sets(name), num_subsets=values["subsets"], subset_size=values["subset_size"], seed=values["rng_seed"]
    )
    # `offset` has kernels of 1e10 and differences of 1e4, so 1e-9 is what float64 leaves.
    assert found == pytest.approx(values["torch_fidelity_float64"], rel=2e-9)


@pytest.mark.parametrize("name", EXPECTED["kid"])
@pytest.mark.parametrize("rows", [7, 64, 2048])
def test_kid_of_whole_sets_equals_the_reference(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_ROWS", rows)
    assert kid(*feature_sets(name)) == pytest.approx(EXPECTED["kid"][name]["full"], rel=2e-8)


def embeddings(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = tensor("embeddings/1"), tensor("embeddings/2")
    return {"main": (first, second), "identical": (first, first), "same_rows_halved": (first[:100], first[100:])}[name]


@pytest.mark.parametrize("name", EXPECTED["cmmd"])
@pytest.mark.parametrize("rows", [33, 2048])
def test_cmmd_equals_the_reference(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_ROWS", rows)
    # The embeddings have length 1 in float32; scaling them again in float64 changes 2e-9.
    assert cmmd(*embeddings(name)) == pytest.approx(EXPECTED["cmmd"][name], rel=1e-8, abs=1e-11)


def test_cmmd_is_of_directions_and_never_negative() -> None:
    first, second = embeddings("main")
    assert cmmd(3 * first, second / 5) == pytest.approx(cmmd(first, second), rel=1e-6)  # float32 products round
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))
    assert 0 <= cmmd(first, first[order]) < 1e-10


def test_the_interval_holds_the_value_and_is_the_slow_bootstrap() -> None:
    generated, reference = feature_sets("rank_deficient")
    value, low, high = kid_interval(generated, reference, num_resamples=40, seed=3)
    assert value == pytest.approx(kid(generated, reference), rel=1e-9) and low < value < high

    rng = np.random.RandomState(3)
    rows = [[rng.randint(len(part), size=len(part)) for _ in range(40)] for part in (generated, reference)]
    slow = []
    for first, second in zip(*rows, strict=True):
        terms = []
        for part, chosen in ((generated, first), (reference, second)):
            x, index = part[torch.from_numpy(chosen)].double(), torch.from_numpy(chosen)
            kernel = (x @ x.T / x.shape[1] + 1) ** 3
            terms.append(kernel[index[:, None] != index].mean())  # no pairs of an image with itself
        x, y = generated[torch.from_numpy(first)].double(), reference[torch.from_numpy(second)].double()
        slow.append((sum(terms) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean()).item())
    assert [low, high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), rel=1e-9)


def test_intervals_cover_the_true_value() -> None:
    torch.manual_seed(0)
    shift = 0.7
    many = [torch.randn(4000, 4) + mean for mean in (0, shift)]
    truth = kid(*many)
    covered = 0
    for trial in range(60):
        torch.manual_seed(100 + trial)
        _, low, high = kid_interval(torch.randn(60, 4), torch.randn(60, 4) + shift, num_resamples=200)
        covered += low <= truth <= high
    assert covered >= 50  # 57 are expected of intervals of 95%, with a deviation of 1.7


def test_mistakes_are_named() -> None:
    rows = torch.zeros(5, 3)
    with pytest.raises(UserError, match=r"^KID: subsets of 1000 .* 5 and 9; use a subset size of 2 to 5"):
        kid_of_subsets(rows, torch.zeros(9, 3))
    with pytest.raises(UserError, match=r"subset size of 2 to 5"):
        kid_of_subsets(rows, rows, subset_size=1)
    with pytest.raises(UserError, match=r"generated images have 3 features each and the reference 4"):
        kid(rows, torch.zeros(9, 4))
    with pytest.raises(UserError, match=r"^KID: needs at least 2 reference images, and there are 1"):
        kid(rows, torch.zeros(1, 3))
    with pytest.raises(UserError, match=r"^CMMD: needs at least 1 generated images, and there are 0"):
        cmmd(torch.zeros(0, 3), rows)
    rows[4, 0] = torch.inf
    with pytest.raises(UserError, match=r"^CMMD: of the reference images, number 4 has features that are NaN or inf"):
        cmmd(torch.zeros(2, 3), rows)
