"""Muon: updates are nearly orthogonal, matrix by matrix; torch's own is the reference; runs resume bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.port import tiny_unet
from uvit.errors import UserError
from uvit.modern_model import ModernUViTT2IModel
from uvit.train.memory import MemoryTracker, trace_muon
from uvit.train.muon import Muon, block_matrices, orthogonalize, shape_batches
from uvit.train.optimizer import build_optimizer, set_learning_rate
from uvit.train.trainer import train


def optimizer_of(networks: dict[str, nn.Module], config: Any) -> Muon:
    optimizer = build_optimizer(nn.ModuleDict(networks), config)
    assert isinstance(optimizer, Muon)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one_and_directions_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40) * torch.tensor([1e-6, 1.0, 1e3]).view(3, 1, 1)
    found = orthogonalize(matrices.to(dtype)).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (torch.linalg.matrix_norm(found - left @ right) < 0.3 * 4).all()  # 4: the norm of the 16 directions


def test_without_a_gradient_there_is_no_update() -> None:
    assert not orthogonalize(torch.zeros(1, 2, 3)).any()


def test_block_matrices_are_those_of_blocks_and_know_their_parts() -> None:
    unet = tiny_unet()
    found = block_matrices(unet)
    names = {name for name, parameter in unet.named_parameters() if parameter in found}
    blocks = ("in_blocks.", "mid_block.", "out_blocks.")
    wanted = {name for name, p in unet.named_parameters() if name.startswith(blocks) and p.ndim == 2}
    assert names == wanted
    assert {found[parameter] for name, parameter in unet.named_parameters() if name.endswith("qkv.weight")} == {3}
    assert {found[parameter] for name, parameter in unet.named_parameters() if name.endswith("fc1.weight")} == {1}


def test_gates_and_values_of_the_modern_block_are_two_matrices() -> None:
    unet = ModernUViTT2IModel(num_layers=2, num_attention_heads=2, attention_head_dim=16, clip_dim=8, num_text_tokens=4)
    found = block_matrices(unet)
    numbers = {name.split(".")[-2]: found[p] for name, p in unet.named_parameters() if p in found}
    assert numbers == {"qkv": 3, "proj": 1, "fc1": 2, "fc2": 1, "skip_linear": 1}


def test_a_step_is_torch_s_of_each_matrix_by_itself(tiny_config: Any) -> None:
    """In bfloat16, like torch's; torch divides by the norm before it transposes, and the order of sums differs."""
    torch.manual_seed(0)
    unet = tiny_unet()
    optimizer = optimizer_of({"unet": unet}, tiny_config(optim="muon", bf16=True, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    for name in ("mid_block.attn.qkv.weight", "mid_block.mlp.fc1.weight", "mid_block.mlp.fc2.weight"):
        parameter = unet.get_parameter(name)
        count = 3 if "qkv" in name else 1
        grads = [torch.randn(parameter.shape) for _ in range(2)]
        theirs = [nn.Parameter(part.clone()) for part in parameter.detach().chunk(count)]
        reference = torch.optim.Muon(theirs, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for grad in grads:
            parameter.grad = grad
            optimizer.step()
            for part, own in zip(theirs, grad.chunk(count), strict=True):
                part.grad = own
            reference.step()
        parameter.grad = None
        moved, wanted = (after.detach() - before[name] for after in (parameter, torch.cat(theirs)))
        assert (moved - wanted).norm() < 0.02 * wanted.norm(), name
    assert torch.equal(unet.pos_embed, before["pos_embed"])  # it had no gradient


def test_all_shapes_come_in_batches_and_none_twice() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 8), (8, 4), (4, 4), (4, 8))]
    for parameter in parameters[:3]:
        parameter.grad = torch.zeros_like(parameter)
    assert [[id(p) for p in batch] for batch in shape_batches(parameters, 1)] == [
        [id(parameters[0]), id(parameters[1])],
        [id(parameters[2])],
    ]
    assert [len(batch) for batch in shape_batches(parameters[:1], 2)] == [1]


def test_rates_are_those_of_each_network_in_proportion(tiny_config: Any) -> None:
    networks = {"unet": tiny_unet(), "text_encoder": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])}
    config = tiny_config(optim="muon", muon_learning_rate=4e-3, learning_rate=1e-3, text_encoder_learning_rate=1e-4)
    optimizer = optimizer_of(networks, config)
    assert set_learning_rate(optimizer, 0.5) == 5e-4
    rates = {group.get("num_matrices", 0): group["lr"] for group in optimizer.param_groups[:4]}
    assert rates == {0: pytest.approx(5e-5), 1: pytest.approx(2e-3), 3: pytest.approx(2e-3)}
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(2e-4)


def test_networks_without_blocks_are_refused(tiny_config: Any) -> None:
    with pytest.raises(UserError, match=r"^--optim muon: the networks have no blocks .* use --optim adamw$"):
        build_optimizer(nn.ModuleDict({"unet": nn.Linear(2, 2)}), tiny_config(optim="muon"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_step_is_known_beforehand(dtype: torch.dtype, tiny_config: Any) -> None:
    unet = tiny_unet()
    optimizer = optimizer_of({"unet": unet}, tiny_config(optim="muon", bf16=dtype == torch.bfloat16))
    matrices = list(block_matrices(unet))
    for parameter in matrices:
        parameter.grad = torch.ones_like(parameter)
        optimizer.momentum(parameter)
    found: list[int] = []
    kept = [tensor for p in matrices for tensor in (p, p.grad, optimizer.momentum(p)) if tensor is not None]
    with MemoryTracker(kept, found.append):
        optimizer.step()
    assert trace_muon([unet], dtype) == (max(found), 0)
    assert max(found) > 0


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return {f"{file}/{name}": tensor for file, content in found.items() for name, tensor in content.items()}


def test_a_run_resumes_bit_for_bit_and_logs_both_rates(tiny_config: Any, tmp_path: Path) -> None:
    flags = {"optim": "muon", "save_steps": 3, "lr_scheduler_type": "constant_with_warmup"}
    assert train(tiny_config(**flags)) == 0
    whole = tensors(tmp_path / "run" / "checkpoint-6")
    assert "optimizer/momentum/unet.mid_block.attn.qkv.weight" in whole
    assert "optimizer/exp_avg_sq/unet.mid_block.attn.qkv.weight" not in whole
    lines = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert '"muon_lr": 0.002' in lines[-1]
    resumed = tiny_config(**flags, resume_from_checkpoint="checkpoint-3")
    assert train(resumed) == 0
    again = tensors(tmp_path / "run" / "checkpoint-6")
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    with pytest.raises(UserError, match=r"optimizer or EMA; pass the same .*\n  optim: was muon, now adamw"):
        train(tiny_config(resume_from_checkpoint="checkpoint-3"))
