"""The memory of a step, traced without numbers, is that of a step with numbers; and its FLOPs are counted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from uvit.config.model import resolve_model_config
from uvit.model import UViTT2IModel
from uvit.train.memory import MemoryTrace, layer_norms_in_float32, trace_memory, trace_step
from uvit.train.profiling import count_flops, meta_unet
from uvit.weights.unet import new_unet

C, H, W, p, D, T, CONTEXT, NUM_BLOCKS = 4, 8, 12, 2, 32, 7, 24, 5
F32, BF16 = torch.float32, torch.bfloat16
TINY = {
    "sample_size": [H, W],
    "num_layers": NUM_BLOCKS - 1,
    "num_attention_heads": 2,
    "attention_head_dim": D // 2,
    "clip_dim": CONTEXT,
    "num_text_tokens": T,
}


MODERN = {"_class_name": "ModernUViTT2IModel", **TINY}


def by_hand() -> tuple[int, int]:
    """FLOPs of a forward pass: (of layers whose input needs no gradient, of the rest)."""
    patches = (H // p) * (W // p)
    L = 1 + T + patches

    def block(queries: int, skip: bool) -> int:
        attention = 2 * L * D * 3 * D + 2 * 2 * queries * L * D + 2 * queries * D * D
        return attention + 2 * (2 * queries * D * 4 * D) + skip * 2 * L * 2 * D * D

    first = 2 * patches * D * C * p * p + 2 * T * CONTEXT * D
    half = NUM_BLOCKS // 2
    blocks = (half + 1) * block(L, skip=False) + (half - 1) * block(L, skip=True) + block(patches, skip=True)
    return first, blocks + 2 * patches * D * p * p * C + 2 * H * W * C * C * 9


def test_flops_are_those_counted_by_hand() -> None:
    first, rest = by_hand()
    assert count_flops(TINY) == (first + rest, 2 * first + 3 * rest)


def test_flops_grow_with_the_batch() -> None:
    forward, step = count_flops(TINY, 1)
    assert count_flops(TINY, 3) == (3 * forward, 3 * step)


def test_the_small_model_does_32_gflop_a_sample() -> None:
    forward, step = count_flops(resolve_model_config("uvit_t2i_small"))
    assert 31.5e9 < forward < 32.5e9
    assert 2.99 < step / forward < 3


def real_trace(model: dict[str, Any], dtype: torch.dtype, autocast: torch.dtype, recompute: bool) -> MemoryTrace:
    """Of a forward and backward with numbers in them."""
    torch.manual_seed(0)
    unet = new_unet(model).to(dtype).train()
    if recompute:
        unet.enable_gradient_checkpointing()
    if autocast != torch.float32:
        layer_norms_in_float32(unet)

    def compute() -> Tensor:
        latents, context = torch.randn(3, C, H, W), torch.randn(3, T, CONTEXT)
        with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
            return unet(latents.to(dtype), torch.ones(3), context.to(dtype)).float().square().mean()

    return trace_memory(unet, compute)


@pytest.mark.parametrize("model", [TINY, MODERN])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "autocast"), [(F32, F32), (F32, BF16), (BF16, F32)])
def test_a_step_without_numbers_takes_the_memory_of_one_with_them(
    model: dict[str, Any], dtype: torch.dtype, autocast: torch.dtype, recompute: bool
) -> None:
    traced = trace_step(model, 3, dtype=dtype, autocast=autocast, recompute=recompute, fused_attention=None)
    real = real_trace(model, dtype, autocast, recompute)
    assert traced.saved == real.saved
    assert traced.gradients[-1] == real.gradients[-1] == dtype.itemsize * meta_unet(model).num_parameters()
    for weight in (0, 1, 2):
        assert traced.peak(weight) == pytest.approx(real.peak(weight), rel=0.01)


def test_what_the_forward_keeps_is_what_autograd_saves() -> None:
    unet = UViTT2IModel(**TINY).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    inputs = torch.randn(3, C, H, W), torch.ones(3), torch.randn(3, T, CONTEXT)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        prediction = unet(*inputs)
        squares = prediction.square()
        loss = squares.mean()
    kept = sum(storage.nbytes() for storage in saved.values())
    kept += loss.nbytes + sum(x.nbytes for x in inputs if x.untyped_storage().data_ptr() not in saved)
    assert trace_step(TINY, 3).saved == pytest.approx(kept, rel=0.01)


def test_activations_shrink_with_recomputing_low_precision_and_tensor_parallelism() -> None:
    kept = trace_step(TINY, 2).saved
    assert trace_step(TINY, 2, recompute=True).saved < kept / 4
    assert trace_step(TINY, 2, autocast=BF16).saved < kept
    assert trace_step(TINY, 2, dtype=BF16).saved < trace_step(TINY, 2, autocast=BF16).saved
    assert trace_step(TINY, 2, tp=2).saved < kept
    assert trace_step(TINY, 2, size=(4, 4)).saved < kept


def test_half_precision_on_a_cpu_keeps_the_weights_of_attention() -> None:
    fused, products = (trace_step(TINY, 2, dtype=BF16, fused_attention=fused).saved for fused in (True, None))
    L = 1 + T + (H // p) * (W // p)
    weights = 2 * 2 * 2 * L * (L * (NUM_BLOCKS - 1) + (H // p) * (W // p))  # 2 bytes, 2 samples, 2 heads
    assert products - fused == pytest.approx(weights, rel=0.5)
    assert trace_step(TINY, 2, fused_attention=True).saved == trace_step(TINY, 2, fused_attention=None).saved


def test_a_tensor_parallel_process_has_its_part_of_each_block() -> None:
    whole, part = meta_unet(TINY).num_parameters(), meta_unet(TINY, tp=2).num_parameters()
    hidden = 4 * D
    split = NUM_BLOCKS * (3 * D * D + D * D + 2 * D * hidden + hidden)
    assert whole - part == split // 2
    whole, part, hidden = meta_unet(MODERN).num_parameters(), meta_unet(MODERN, tp=2).num_parameters(), 96
    assert whole - part == NUM_BLOCKS * (3 * D * D + D * D + 3 * D * hidden) // 2
