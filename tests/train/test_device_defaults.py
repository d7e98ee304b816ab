"""On a GPU, what is fast without a flag, and flags that say otherwise; on a CPU, what is published."""

from typing import Any

import pytest
import torch

from tests.pretend_gpu import pretend_gpus
from uvit.config.train import TrainConfig
from uvit.train.device_defaults import describe_speed, with_device_defaults

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def chosen(device: torch.device, **flags: Any) -> tuple[bool | None, bool | None]:
    config = with_device_defaults(TrainConfig("features", "out", **flags), device)
    return config.bf16, config.compile


def test_on_a_cpu_nothing_changes() -> None:
    assert chosen(CPU) == (False, False)
    assert chosen(CPU, bf16=True, compile=True) == (True, True)


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvit.train.device_defaults.has_triton", lambda: True)
    with pretend_gpus():
        assert chosen(GPU) == (True, True)
        assert chosen(GPU, bf16=False, compile=False) == (False, False)
        assert chosen(GPU, fp16=True) == (False, True)
        assert chosen(GPU, max_steps=999, warmup_steps=10) == (True, False)
        assert chosen(GPU, max_steps=999, warmup_steps=10, num_train_epochs=2.0) == (True, True)
        assert chosen(GPU, align="sra") == (True, False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        monkeypatch.setattr("uvit.train.device_defaults.has_triton", lambda: False)
        assert chosen(GPU) == (False, False)


def test_it_is_said() -> None:
    config = TrainConfig("features", "out", bf16=True, compile=True)
    assert "bfloat16, and TF32 for what stays float32; compiled block by block" in describe_speed(config)
    config = TrainConfig("features", "out", bf16=False, compile=False, tf32=False)
    assert "computes in float32; not compiled" in describe_speed(config)
