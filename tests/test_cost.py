import torch

from uvit.config.model import resolve_model_config
from uvit.cost import activation_bytes, count_flops
from uvit.model import UViTT2IModel

C, H, W, p, D, T, CONTEXT, NUM_BLOCKS = 4, 8, 12, 2, 32, 7, 24, 5
TINY = {
    "sample_size": [H, W],
    "num_layers": NUM_BLOCKS - 1,
    "num_attention_heads": 2,
    "attention_head_dim": D // 2,
    "clip_dim": CONTEXT,
    "num_text_tokens": T,
}


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


def test_activations_are_those_of_a_real_forward() -> None:
    torch.manual_seed(0)
    unet = UViTT2IModel(**TINY).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.randn(3, C, H, W), torch.ones(3), torch.randn(3, T, CONTEXT))
    assert activation_bytes(TINY, 3) == sum(storage.nbytes() for storage in kept.values())


def test_activations_shrink_with_recomputing_and_with_half_precision() -> None:
    kept = activation_bytes(TINY, 2)
    assert activation_bytes(TINY, 2, recompute=True) < kept / 4
    assert activation_bytes(TINY, 2, dtype=torch.bfloat16) < kept
    assert activation_bytes(TINY, 2, size=(4, 4)) < kept
