"""Features go to the memory that is asked for, if they fit there; otherwise a sentence says what is missing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.pretend_gpu import pretend_gpus
from uvit.errors import UserError
from uvit.train.memory_features import needed_arrays
from uvit.train.placement import available_bytes, place_features
from uvit.train.setup import Run, build_run


def run_of(config: Any) -> Run:
    return build_run(config, Path(config.output_dir))


def test_on_a_cpu(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("auto", "none"):
        run = run_of(tiny_config(features_in_memory=wanted))
        assert place_features(run) is None and run.batches.memory is None
    run = run_of(tiny_config(features_in_memory="host"))
    said = place_features(run)
    assert said is not None and said.startswith("features are in the main memory: ") and run.batches.memory is not None
    kinds = set(needed_arrays(run.features, use_tokens=True, use_teacher=False))  # type: ignore[arg-type]
    assert kinds == {"latents", "tokens"}
    with pytest.raises(UserError, match="--features_in_memory device: the device is the CPU; use host"):
        place_features(run_of(tiny_config(features_in_memory="device")))
    assert available_bytes() > 2**20
    monkeypatch.setattr("uvit.train.placement.available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"--features_in_memory host: the features have .*; use none, or store token"):
        place_features(run_of(tiny_config(features_in_memory="host")))


def test_npy_features_stay_on_disk(tiny_config: Any, tmp_path: Path) -> None:
    (tmp_path / "npy" / "train").mkdir(parents=True)
    for name, shape in (("train/0", (8, 4, 4)), ("train/0_0", (16, 32)), ("empty_context", (16, 32))):
        np.save(tmp_path / "npy" / f"{name}.npy", np.zeros(shape, np.float32))
    flags = {"feature_path": str(tmp_path / "npy"), "latent_scale": 0.5}
    with pytest.raises(UserError, match="--features_in_memory host: needs a feature store"):
        place_features(run_of(tiny_config(features_in_memory="host", **flags)))


def test_on_a_gpu_with_enough_memory(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpus():
        config = tiny_config(device="cuda:1")
        run = run_of(config)
        said = place_features(run)
        assert said is not None and said.startswith("features are in the GPU's memory")
        assert run.batches.memory is not None and run.batches.memory.latents.device == torch.device("cuda", 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**20))
        run = run_of(config)
        said = place_features(run)
        assert said is not None and said.startswith("features are read from disk: the features have")
        assert run.batches.memory is None
        with pytest.raises(UserError, match=r"--features_in_memory device: .* of which there are 1.0 MiB"):
            place_features(run_of(tiny_config(device="cuda:1", features_in_memory="device")))
