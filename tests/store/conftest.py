"""A store of 11 made-up pairs in 3 shards (tests/store/test_reader.py says what they hold), and .npy features."""

from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import info, write_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of features with the split `train`, two of whose pairs were skipped."""
    write_store(tmp_path / "store" / "train", info(flipped=True), left_out={2, 5})
    return tmp_path / "store"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Random .npy features, two splits, float32: moments for the tiny VAE, text embeddings for its text encoder."""
    random = np.random.default_rng(0)
    folder = tmp_path / "old"
    for split, num_pairs in (("train", 5), ("val", 2)):
        (folder / split).mkdir(parents=True)
        for i in range(num_pairs):
            np.save(folder / split / f"{i}.npy", random.standard_normal((8, 4, 4), dtype=np.float32))
            for k in range(1 + i % 3):
                np.save(folder / split / f"{i}_{k}.npy", random.standard_normal((16, 32), dtype=np.float32))
    np.save(folder / "empty_context.npy", random.standard_normal((16, 32), dtype=np.float32))
    return folder
