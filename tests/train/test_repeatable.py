"""`--deterministic` chooses, and leaves things as they were. What it does on a GPU is only seen on one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from uvit.train.process import deterministic_mode
from uvit.train.trainer import train


def chosen() -> list[bool]:
    backends = torch.backends
    return [
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.deterministic,
        backends.cudnn.benchmark,
        backends.cuda.cudnn_sdp_enabled(),
    ]


def test_what_is_chosen_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a person's own choice stays
    before = chosen()
    with deterministic_mode(False):
        assert chosen() == before
    with deterministic_mode(True):
        assert chosen() == [True, True, False, False]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert chosen() == before


def test_on_a_cpu_it_makes_no_difference(tiny_config: Any, tmp_path: Path) -> None:
    for flag in (False, True):
        train(tiny_config(output_dir=str(tmp_path / str(flag)), max_steps=3, deterministic=flag))
    one, other = (load_file(tmp_path / str(flag) / "checkpoint-3" / "weights.safetensors") for flag in (False, True))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [{}, {"bf16": True}, {"fp16": True, "fp16_opt_level": "O2"}])
def test_on_a_gpu_the_same_run_gives_the_same_bits(flags: dict[str, Any], tiny_config: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        output_dir = str(tmp_path / name)
        train(tiny_config(output_dir=output_dir, deterministic=True, device="cuda", train_text_encoder=True, **flags))
    one, other = (load_file(tmp_path / name / "checkpoint-6" / "weights.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
