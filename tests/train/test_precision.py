"""Where the numbers live; how close they stay is in test_step.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from uvit.train.setup import build_run


@pytest.mark.parametrize(
    ("flags", "dtype", "has_copy", "scales"),
    [
        ({}, torch.float32, False, False),
        ({"bf16": True}, torch.bfloat16, False, False),
        ({"fp16": True}, torch.float16, False, True),
        ({"fp16": True, "fp16_opt_level": "O2"}, torch.float16, True, True),
        ({"fp16_opt_level": "O2"}, torch.float32, False, False),
    ],
)
def test_the_four_ways(
    flags: dict[str, Any], dtype: torch.dtype, has_copy: bool, scales: bool, tiny_config: Any, tmp_path: Path
) -> None:
    precision = build_run(tiny_config(**flags), tmp_path).precision
    assert (precision.dtype, precision.has_copy, precision.scale.enabled) == (dtype, has_copy, scales)
    assert {p.dtype for p in precision.master_model.parameters()} == {torch.float32}
    assert {p.dtype for p in precision.compute_model.parameters()} == {dtype if has_copy else torch.float32}
