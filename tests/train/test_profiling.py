"""Utilisation is the model's work over what the hardware could do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import TINY_MODEL
from uvit.device import measured_peak
from uvit.train.profiling import MfuReference, count_flops, known_peak, mfu_reference
from uvit.train.setup import build_run


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L20", 119.5e12, 59.8e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA H20-3e", 148e12, 44e12),
        ("NVIDIA H800", 989e12, 67e12),
        ("NVIDIA H800 PCIe", 756e12, 51e12),
        ("NVIDIA A800-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA B300 SXM6 AC", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
        ("NVIDIA GeForce RTX 5090 D", None, None),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9e12, 43.9e12),
        ("NVIDIA GeForce RTX 5070", 61.7e12, 30.9e12),
        ("NVIDIA GeForce RTX 4090 D", 147.1e12, 73.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("NVIDIA A1000", None, None),
    ],
)
def test_peaks_by_name(name: str, half: float | None, single: float | None) -> None:
    assert known_peak(name, torch.bfloat16) == known_peak(name, torch.float16) == half
    assert known_peak(name, torch.float32) == single
    assert known_peak(name, torch.float32, tf32=True) == (half and half / 2)


def test_the_work_of_a_step_is_that_of_its_samples(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(per_device_train_batch_size=4, gradient_accumulation_steps=2, recompute=True)
    work = mfu_reference(build_run(config, tmp_path))
    assert work.flops == 8 * count_flops(TINY_MODEL, size=(4, 4))[1]
    assert work.peak == measured_peak(torch.float32)
    assert "measured just now: float32 matrix products on this CPU" in work.sentence


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert MfuReference(flops=10, peak=40.0, sentence="").utilisation(0.5) == 0.5
    assert MfuReference(flops=10, peak=None, sentence="").utilisation(0.5) is None
