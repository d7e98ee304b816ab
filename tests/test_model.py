"""The network against arrays of another implementation, and what its size, grid and checkpointing promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.port import same
from uvit.config.model import resolve_model_config
from uvit.model import PatchEmbed, UViTT2IModel, attention, timestep_embedding

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["uvit_pipe_small", "uvit_train_small"]
TINY = {
    "sample_size": 8,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "clip_dim": 32,
    "num_text_tokens": 7,
}


def load(name: str) -> tuple[UViTT2IModel, dict[str, torch.Tensor]]:
    """The model with the fixture's weights; LayerNorms that have none there are 1 and 0, and frozen."""
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    model = UViTT2IModel(**TINY)
    weights = {key.removeprefix("weights/"): value for key, value in arrays.items() if key.startswith("weights/")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("norm" in key for key in missing)
    for key in missing:
        model.get_parameter(key).requires_grad_(False)
    return model, arrays


def tiny(**changes: object) -> UViTT2IModel:
    torch.manual_seed(0)
    return UViTT2IModel(**(TINY | changes))


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, height, width, generator=generator)
    return latents, torch.tensor([3, 700]), torch.randn(2, 7, 32, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_the_fixture(name: str) -> None:
    model, arrays = load(name)
    with torch.no_grad():
        out = model(arrays["x"], arrays["t"], arrays["context"])
        out_scalar = model(arrays["x"], arrays["t_scalar"][0], arrays["context"])
    torch.testing.assert_close(out, arrays["out"], atol=2e-6, rtol=0)
    torch.testing.assert_close(out_scalar, arrays["out_t_scalar"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_fixture(name: str) -> None:
    model, arrays = load(name)
    F.mse_loss(model(arrays["x"], arrays["t"], arrays["context"]), arrays["target"]).backward()
    wanted = {key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")}
    assert len(wanted) >= 3
    for key, value in wanted.items():
        torch.testing.assert_close(
            model.get_parameter(key).grad, value, atol=5e-7, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_adamw_trace_equals_the_fixture(name: str) -> None:
    model, arrays = load(name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.03, fused=True)
    losses = []
    for lr in arrays["adamw_lrs"].tolist():
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = F.mse_loss(model(arrays["x"], arrays["t"], arrays["context"]), arrays["target"])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), arrays["adamw_losses"], atol=1e-6, rtol=0)
    for key, value in arrays.items():
        if key.startswith("final/"):  # Adam divides tiny gradients by their own size: less exact than the losses
            weight = model.get_parameter(key.removeprefix("final/")).detach()
            torch.testing.assert_close(weight, value, atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("uvit_t2i_small", 44_692_644),
        ("uvit_t2i_small_deep", 58_345_636),
        ("uvit_t2i_large", 232_034_468),
        ("uvit_t2i_gaint", 362_132_644),
        ("uvit_t2i_huge", 500_652_452),
        ("uvit_t2i_850M", 850_584_228),
        ("uvit_t2i_gaint2", 950_684_176),
    ],
)
def test_parameter_counts(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = UViTT2IModel(**resolve_model_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 6))
def test_smaller_latents_take_the_middle_of_the_position_grid(rows: int, columns: int) -> None:
    model = tiny(sample_size=(8, 12))
    latents, timestep, context = inputs(2 * rows, 2 * columns)
    top, left = (4 - rows) // 2, (6 - columns) // 2
    cut = tiny(sample_size=(2 * rows, 2 * columns))
    state = model.state_dict()
    grid = state["pos_embed"][:, 8:].view(1, 4, 6, 32)[:, top : top + rows, left : left + columns]
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :8], grid.reshape(1, rows * columns, 32)], dim=1)
    cut.load_state_dict(state)
    with torch.no_grad():
        out = model(latents, timestep, context)
        assert out.shape == latents.shape
        assert torch.equal(out, cut(latents, timestep, context))


def test_too_large_latents_are_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"8x10.*8x8"):
        tiny()(*inputs(8, 10))


def test_sizes_that_cannot_be_cut_into_patches_are_errors() -> None:
    with pytest.raises(ValueError, match=r"7x8.*2x2"):
        tiny()(*inputs(7, 8))
    with pytest.raises(ValueError, match=r"9x9.*patch_size 2"):
        tiny(sample_size=9)


def test_a_context_of_another_length_is_an_error_with_both_numbers() -> None:
    latents, timestep, context = inputs()
    with pytest.raises(ValueError, match=r"6 tokens.* 7"):
        tiny()(latents, timestep, context[:, :6])


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny().train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.enable_gradient_checkpointing()
        assert model.gradient_checkpointing is recompute
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_gradient_checkpointing_keeps_fewer_tensors() -> None:
    counts = []
    for recompute in (False, True):
        model = tiny()
        if recompute:
            model.enable_gradient_checkpointing()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            model(*inputs())
        counts.append(sum(saved))
    assert counts[1] < counts[0] / 2


def test_saving_and_loading_keep_config_and_outputs(tmp_path: Path) -> None:
    model = tiny(sample_size=(8, 12), conv=False).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = UViTT2IModel.from_pretrained(tmp_path, use_safetensors=True)
    assert again.grid == model.grid
    assert isinstance(again.final_layer, torch.nn.Identity)
    with torch.no_grad():
        assert torch.equal(again(*inputs(8, 12)), model(*inputs(8, 12)))


def test_timestep_may_be_one_for_all() -> None:
    model = tiny()
    latents, _, context = inputs()
    with torch.no_grad():
        each = model(latents, torch.tensor([500, 500]), context)
        for one in (500, 500.0, torch.tensor(500), torch.tensor([500])):
            assert torch.equal(model(latents, one, context), each)


def test_timestep_embedding_has_cosines_first() -> None:
    embedding = timestep_embedding(torch.tensor([0, 1, 1000]), 64)
    assert torch.equal(embedding[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    assert embedding[1, 0].item() == pytest.approx(np.cos(1), abs=1e-6)
    assert embedding[1, 32].item() == pytest.approx(np.sin(1), abs=1e-6)
    torch.testing.assert_close(embedding[:, :32] ** 2 + embedding[:, 32:] ** 2, torch.ones(3, 32))


def test_initialisation() -> None:
    model = tiny(num_attention_heads=4, attention_head_dim=32)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") and not key.startswith(("patch_embed", "final_layer")):
            assert not parameter.any(), key
        elif "norm" in key:
            assert parameter.eq(1).all(), key
        elif parameter.ndim in (2, 3):  # Linear weights, pos_embed
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), key
            assert parameter.abs().max() > 0.05, f"{key} is cut at two standard deviations"


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    model = tiny()
    latents, timestep, context = inputs()
    with torch.no_grad():
        together = model(latents, timestep, context)
        alone = torch.cat([model(latents[i : i + 1], timestep[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_every_token_matters() -> None:
    """Text and time reach the output although the last block computes its tail for image tokens only."""
    model = tiny()
    latents, timestep, context = inputs()
    context.requires_grad_()
    model(latents, timestep, context).square().sum().backward()
    assert context.grad is not None
    assert context.grad.abs().amax(dim=-1).min() > 0
    with torch.no_grad():
        assert not torch.equal(model(latents, timestep, context), model(latents, timestep + 100, context))


def test_a_bottleneck_is_two_linear_maps_without_anything_between_them() -> None:
    model = tiny(patch_size=4, bottleneck_dim=6)
    proj, expand = model.patch_embed.proj, model.patch_embed.expand
    shapes = {name: tuple(value.shape) for name, value in model.patch_embed.state_dict().items()}
    assert shapes == {"proj.weight": (6, 4, 4, 4), "expand.weight": (32, 6), "expand.bias": (32,)}
    latents, timestep, context = inputs()
    patches = latents.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # by hand
    by_hand = patches @ proj.weight.flatten(1).T @ expand.weight.T + expand.bias
    torch.testing.assert_close(model.patch_embed(latents), by_hand, atol=1e-6, rtol=0)
    assert model(latents, timestep, context).shape == latents.shape


def test_without_a_bottleneck_the_layout_is_the_published_one() -> None:
    assert list(PatchEmbed(4, 32, 2).state_dict()) == ["proj.weight", "proj.bias"]
    assert same(tiny(bottleneck_dim=None).state_dict(), tiny().state_dict())


def attention_and_gradients(dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
    """The output of attention and the gradients of q, k and v, in float64; of bfloat16 numbers in any dtype."""
    generator = torch.Generator().manual_seed(2)
    q, k, v, grad = (torch.randn(2, 3, L, 16, generator=generator).bfloat16().to(dtype) for L in (21, 35, 35, 21))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = attention(q, k, v, fused)
    out.backward(grad)
    return [tensor.detach().double() for tensor in (out, q.grad, k.grad, v.grad) if tensor is not None]


def test_attention_by_products_is_close_to_the_fused_kernel() -> None:
    exact = attention_and_gradients(torch.float64, fused=True)
    torch.testing.assert_close(attention_and_gradients(torch.float64, fused=False), exact)

    def errors(fused: bool) -> list[float]:
        found = attention_and_gradients(torch.bfloat16, fused)
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    for products, kernel in zip(errors(fused=False), errors(fused=True), strict=True):
        assert products < 2.5 * kernel  # q k^T is rounded too: 1.4 to 1.6 times on a Xeon with AMX
        assert products < 2**-7  # a last place of bfloat16


@pytest.mark.parametrize(
    ("dtype", "training", "fused"),
    [(torch.float32, True, True), (torch.bfloat16, False, True), (torch.bfloat16, True, False)],
)
def test_only_training_in_half_precision_uses_products(dtype: torch.dtype, training: bool, fused: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    q.requires_grad_(training)
    assert attention(q, k, v).equal(attention(q, k, v, fused))
    assert dtype == torch.float32 or not attention(q, k, v).equal(attention(q, k, v, not fused))
