"""Statistics are written and read back bit for bit, those of other code are read, and mixing extractors is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uvit.errors import UserError
from uvit.evaluate.extractors import Extractor
from uvit.evaluate.frechet import frechet_distance, statistics_of
from uvit.evaluate.statistics_file import check_same_features, read_statistics, write_statistics

FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
EXTRACTOR = Extractor(
    name="tiny",
    distance="FD-tiny",
    width=6,
    weights_hash="ab" * 32,
    recipe={"size": 8, "mean": (0.5, 0.5)},
    device=torch.device("cpu"),
    preprocess=lambda image: torch.from_numpy(image).float(),
    network=lambda pixels: {"features": pixels.flatten(1)},
)


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    path, statistics = tmp_path / "new" / "a.npz", statistics_of(FEATURES)
    write_statistics(path, statistics, EXTRACTOR)
    saved = read_statistics(path)
    assert torch.equal(saved.statistics.mean, statistics.mean)
    assert torch.equal(saved.statistics.covariance, statistics.covariance)
    assert (saved.statistics.num_images, saved.extractor) == (50, "tiny")
    check_same_features(saved, EXTRACTOR)
    with np.load(path, allow_pickle=False) as file:  # other code finds what it expects
        assert file["mu"].shape == (6,) and file["sigma"].shape == (6, 6)
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_files_of_other_code(dtype: Any, tmp_path: Path) -> None:
    wide = torch.randn(10, 40, generator=torch.Generator().manual_seed(1))  # no full rank
    expected = statistics_of(wide)
    mu, sigma = wide.double().mean(0).numpy(), np.cov(wide.double().numpy(), rowvar=False)
    np.savez_compressed(tmp_path / "fid.npz", mu=mu.astype(dtype), sigma=sigma.astype(dtype))
    saved = read_statistics(tmp_path / "fid.npz")
    assert (saved.extractor, saved.statistics.num_images) == (None, None)
    assert frechet_distance(saved.statistics, expected) < (1e-12 if dtype == np.float64 else 1e-3)
    check_same_features(saved, dataclasses.replace(EXTRACTOR, width=40))
    with pytest.raises(UserError, match=r"fid.npz: has 40 features, and tiny has 6"):
        check_same_features(saved, EXTRACTOR)
    # dgm-eval keeps the features, beside a pickle that is not read.
    np.savez(tmp_path / "reps.npz", reps=wide.numpy(), model="tiny", hparams=np.array({"a": 1}, dtype=object))
    found = read_statistics(tmp_path / "reps.npz").statistics
    assert torch.equal(found.covariance, expected.covariance) and found.num_images == 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "other"}, "was made with tiny, and the images are evaluated with other"),
        ({"weights_hash": "cd" * 32}, r"other weights of tiny \(SHA-256 abababab, not cdcdcdcd\)"),
        ({"recipe": {"size": 9}}, r"prepared otherwise \(.*\"size\": 8"),
        ({"width": 7}, "has 6 features, and tiny has 7"),
    ],
)
def test_another_extractor_is_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_statistics(tmp_path / "a.npz", statistics_of(FEATURES), EXTRACTOR)
    with pytest.raises(UserError, match=rf"a.npz: .*{problem}.*; use one extractor for both"):
        check_same_features(read_statistics(tmp_path / "a.npz"), dataclasses.replace(EXTRACTOR, **change))


EYE, ZEROS = np.eye(3), np.zeros(3)
INVALID: list[tuple[dict[str, Any], str]] = [
    ({}, "holds nothing, not the arrays mu and sigma"),
    ({"mu": ZEROS}, "holds mu, not the arrays mu and sigma"),
    ({"features": EYE}, "holds features, not"),
    ({"mu": np.zeros(2), "sigma": EYE}, r"mu float64 \(2,\) and sigma float64 \(3, 3\) are no mean"),
    ({"mu": ZEROS[None], "sigma": EYE}, "are no mean"),
    ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "are no mean"),
    ({"mu": np.array(["a", "b", "c"]), "sigma": EYE}, "are no mean"),
    ({"mu": ZEROS, "sigma": EYE * np.nan}, "holds NaN or infinity"),
    ({"mu": ZEROS + np.inf, "sigma": EYE}, "holds NaN or infinity"),
    ({"mu": ZEROS, "sigma": EYE + np.triu(np.ones((3, 3)), 1)}, "sigma is not symmetric"),
    ({"mu": ZEROS, "sigma": np.diag([1.0, -1.0, 1.0])}, "sigma has negative eigenvalues"),
    ({"mu": ZEROS, "sigma": EYE, "recipe": np.array("{")}, "its recipe is not JSON"),
    ({"mu": np.array({}, dtype=object), "sigma": EYE}, "holds sigma, not"),
    ({"reps": np.ones((1, 3))}, "1 image has no covariance"),
]


@pytest.mark.parametrize(("arrays", "problem"), INVALID)
def test_files_without_statistics_are_one_sentence(arrays: dict[str, Any], problem: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=problem):
        read_statistics(tmp_path / "bad.npz")


def test_damaged_and_missing_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    write_statistics(path, statistics_of(FEATURES), EXTRACTOR)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:200], whole[:-30], whole[:900] + bytes(40) + whole[940:], b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.npz: "):
            read_statistics(path)
    np.save(tmp_path / "one.npy", EYE)
    with pytest.raises(UserError, match=r"one.npy: holds nothing, not the arrays mu"):
        read_statistics(tmp_path / "one.npy")
    with pytest.raises(UserError, match=r"nowhere.npz: no such file"):
        read_statistics(tmp_path / "nowhere.npz")
    with pytest.raises(UserError, match=r"a.txt: statistics are written as .npz"):
        write_statistics(tmp_path / "a.txt", statistics_of(FEATURES), EXTRACTOR)


def test_a_covariance_of_zeros_is_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "point.npz", mu=ZEROS, sigma=0 * EYE)
    saved = read_statistics(tmp_path / "point.npz")
    assert frechet_distance(saved.statistics, saved.statistics) == 0
