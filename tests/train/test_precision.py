"""Where the numbers live; how close they stay is in test_step.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from uvit.train.setup import build_run
from uvit.train.step import batch_loss


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


def test_a_copy_s_gradients_are_added_up_in_float32(tiny_config: Any, tmp_path: Path) -> None:
    """Those of four microbatches, each in bfloat16, to the bit; in bfloat16, their sum would be another one."""
    flags = {"bf16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 4}
    run = build_run(tiny_config(**flags), tmp_path)
    copied = dict(run.precision.compute_model.named_parameters())
    each: dict[str, list[torch.Tensor]] = {name: [] for name in copied}
    for i in range(4):
        loss = batch_loss(run, run.batches[i]) / 4
        names = list(copied)
        for name, grad in zip(names, torch.autograd.grad(loss, list(copied.values())), strict=True):
            each[name].append(grad)
        run.gradients.microbatch(last=i == 3)
        run.precision.backward(batch_loss(run, run.batches[i]) / 4)
    run.gradients.finish()
    for name, master in run.master_model.named_parameters():
        parts = [part.float() for part in each[name]]
        assert torch.equal(master.grad, parts[0] + parts[1] + parts[2] + parts[3]), name
        assert copied[name].grad is None
    weight = each["unet.mid_block.mlp.fc1.weight"]
    in_bfloat16 = (weight[0] + weight[1] + weight[2] + weight[3]).float()
    assert not torch.equal(in_bfloat16, run.master_model["unet"].mid_block.mlp.fc1.weight.grad)
