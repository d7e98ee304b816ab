from pathlib import Path

import numpy as np

from uvit.bench.random_store import write_random_store
from uvit.model import UViTT2IModel
from uvit.store.reader import open_features


def test_the_store_opens_and_has_the_models_shapes(tmp_path: Path) -> None:
    unet = UViTT2IModel(
        sample_size=(8, 12),
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        clip_dim=24,
        num_text_tokens=7,
    )
    features = open_features(write_random_store(tmp_path / "store", unet, num_pairs=10, block=4))
    assert (features.num_samples, features.moments_shape, features.context_shape) == (10, (8, 8, 12), (7, 24))
    rows = np.array([0, 4, 9])
    read = features.read(rows, np.zeros(3))
    assert read.context is not None
    assert np.isfinite(read.moments).all()
    assert np.array_equal(read.moments[0], read.moments[1])
    assert not np.array_equal(read.moments[0], read.moments[2])
