"""Reference values of the metrics, and the sets of features that they belong to (tests/fixtures/README.md)."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "fixtures" / "metrics"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
ARRAYS = np.load(FOLDER / "features.npz")
GAUSSIANS = np.load(FOLDER / "gaussians.npz")
INCEPTION = np.load(FOLDER / "inception.npz")
EFFICIENTNET = np.load(FOLDER / "efficientnet_lite0.npz")


def tensor(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name])


def feature_sets(name: str) -> tuple[Tensor, Tensor]:
    """The generated and the reference set, float32."""
    if name == "identical":
        return tensor("main/1"), tensor("main/1")
    if name == "constant_column":
        generated, reference = tensor("main/1"), tensor("main/2")
        return torch.nn.functional.pad(generated[:, :8], (0, 2)), torch.nn.functional.pad(reference[:, :8], (0, 2))
    if name == "main_rows_reversed":
        return tensor("main/1").flip(0), tensor("main/2").flip(0)
    if name == "wide":
        return _like_inception(300, 2048, 5), _like_inception(250, 2048, 6, 0.1)
    if name == "long":
        return _like_inception(20000, 128, 7), _like_inception(10000, 128, 8, 0.05)
    return tensor(f"{name}/1"), tensor(f"{name}/2")


def _like_inception(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    shared = np.random.RandomState(12345)
    w, bias = shared.standard_normal((48, width)) / np.sqrt(48), 0.2 * shared.standard_normal(width)
    rng = np.random.RandomState(seed)
    z, noise = rng.standard_normal((n, 48)) + shift, rng.standard_normal((n, width))
    return torch.from_numpy(np.maximum(z @ w + bias + 0.3 * noise, 0).astype(np.float32))


def formula_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network by a formula of their names, with which the reference features were made."""
    return {name: torch.from_numpy(_formula(name, tuple(value.shape))) for name, value in state.items()}


def _formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return (0.75 + 0.5 * rng.random_sample(shape)).astype(np.float32)
    z = rng.standard_normal(shape)
    if re.search(r"(bn\d?\.bias|running_mean|fc\.bias)$", name):
        return (0.1 * z).astype(np.float32)
    if re.search(r"bn\d?\.weight$", name):
        return (1 + 0.1 * z).astype(np.float32)
    return (z * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def synthetic_image(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8. The reference pictures are (96, 96, 1) and (400, 310, 2)."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3].astype(np.int64)
    a = (x * (3 + c + seed) + y * (5 - c) + (x * y) // (7 + seed)) % 256
    return ((a + ((x // 8 + y // 8 + c) % 2) * 64) % 256).astype(np.uint8)
