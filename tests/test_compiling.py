"""Compiled blocks: as many graphs as kinds of block, the same numbers, and gradients as soon as they are known."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from uvit.compiling import compile_blocks
from uvit.errors import UserError
from uvit.model import UViTT2IModel


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"^--compile: needs the C\+\+ compiler .* on a CPU; install it, or leave"):
        compile_blocks([nn.Linear(1, 1)])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_each_kind_of_block_is_compiled_once_and_computes_the_same() -> None:
    torch.manual_seed(0)
    unet = UViTT2IModel(
        sample_size=4, num_layers=6, num_attention_heads=2, attention_head_dim=8, clip_dim=8, num_text_tokens=3
    )
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), torch.randn(2, 3, 8)
    blocks = [*unet.in_blocks, unet.mid_block, *unet.out_blocks]

    def gradients() -> list[torch.Tensor]:
        unet(*inputs).square().mean().backward()
        found = [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]
        unet.zero_grad()
        return found

    expected = gradients()
    compile_blocks(blocks, backend="aot_eager")
    counters.clear()
    found = gradients()
    assert counters["stats"]["unique_graphs"] == 3  # without a skip connection, with one, and the last block
    assert not counters["graph_break"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)  # the order of some sums differs

    order: list[str] = []
    for name, parameter in unet.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    handle = blocks[0].register_full_backward_pre_hook(lambda *_: order.append("first block"))
    gradients()
    handle.remove()
    assert order.index("out_blocks.2.mlp.fc2.weight") < len(order) / 3 < order.index("first block")
