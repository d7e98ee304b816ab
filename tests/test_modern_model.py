"""The modern block: what it begins as, what its attention depends on, and what it shares with the published model."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit.modern_model import SKIPS, ModernAttention, ModernUViTT2IModel, rotate, rotation_angles

TINY = {
    "sample_size": 8,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "clip_dim": 32,
    "num_text_tokens": 7,
}


def new(**changes: object) -> ModernUViTT2IModel:
    torch.manual_seed(0)
    return ModernUViTT2IModel(**(TINY | changes))


def trained(**changes: object) -> ModernUViTT2IModel:
    """As after training: no weight is zero."""
    model = new(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) / 10
    return model.eval()


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, height, width, generator=generator)
    return latents, torch.tensor([3, 700]), torch.randn(2, 7, 32, generator=generator)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("conv", [True, False])
def test_a_new_model_predicts_zero_and_its_weights_get_gradients(skip: str, conv: bool) -> None:
    model = new(skip=skip, conv=conv)
    out = model(*inputs())
    assert not out.any()
    (out - 1).square().sum().backward()
    assert model.decoder_pred.weight.grad is not None
    assert model.decoder_pred.weight.grad.any()


def test_initialisation() -> None:
    model = new(num_attention_heads=4, attention_head_dim=32)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") and not key.startswith("patch_embed"):
            assert not parameter.any(), key
        elif "norm" in key:
            assert parameter.eq(1).all(), key
        elif key.endswith(("attn.proj.weight", "mlp.fc2.weight", "decoder_pred.weight")):
            assert not parameter.any(), key
        elif parameter.ndim in (2, 3):  # Linear weights, pos_embed
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), key
    image = torch.randn(1, 4, 8, 8)
    assert torch.equal(model.final_layer(image), image)


@settings(max_examples=20, deadline=None)
@given(down=st.integers(-9, 9), right=st.integers(-9, 9))
def test_logits_of_patches_depend_on_their_relative_positions_only(down: int, right: int) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 1, 12, 16, generator=generator, dtype=torch.float64)

    def logits(row: int, column: int) -> torch.Tensor:
        angles = rotation_angles(torch.arange(3) + row, torch.arange(4) + column, 16).double()
        return rotate(q, angles.cos(), angles.sin()) @ rotate(k, angles.cos(), angles.sin()).mT

    torch.testing.assert_close(logits(down, right), logits(0, 0), atol=1e-4, rtol=0)  # the angles are float32
    assert (logits(0, 0) - q @ k.mT).abs().max() > 0.1


def test_rows_and_columns_each_turn_half_of_the_channels() -> None:
    angles = rotation_angles(torch.arange(3), torch.arange(5), 16).view(3, 5, 8)
    assert torch.equal(angles[:, :1, :4].expand(-1, 5, -1), angles[:, :, :4])
    assert torch.equal(angles[:1, :, 4:].expand(3, -1, -1), angles[:, :, 4:])
    assert torch.equal(angles[:, 0, :4], angles[0, :3, 4:])
    assert torch.equal(angles[:, 0, 0], torch.arange(3.0))


def test_time_and_text_do_not_turn() -> None:
    cos, sin = new()._rotations(4, 4, torch.device("cpu"))
    assert cos[:8].eq(1).all() and not sin[:8].any()
    assert sin[9:].any(dim=1).all()  # the first patch is in row 0 and column 0


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 6))
def test_smaller_latents_take_the_middle_of_the_grid(rows: int, columns: int) -> None:
    model = new(sample_size=(8, 12))
    top, left = (4 - rows) // 2, (6 - columns) // 2
    cpu = torch.device("cpu")
    for whole, part in zip(model._rotations(4, 6, cpu), model._rotations(rows, columns, cpu), strict=True):
        middle = whole[8:].view(4, 6, -1)[top : top + rows, left : left + columns]
        assert torch.equal(part, torch.cat([whole[:8], middle.flatten(0, 1)]))
    assert model(*inputs(2 * rows, 2 * columns)).shape == (2, 4, 2 * rows, 2 * columns)


def test_normalized_queries_and_keys_keep_the_logits_bounded() -> None:
    attention = ModernAttention(32, 2)
    x = torch.randn(2, 9, 32)
    no_turn = torch.ones(9, 8), torch.zeros(9, 8)
    with torch.no_grad():
        before = attention(x, *no_turn, 9)
        attention.qkv.weight[:64] *= 1000  # queries and keys
        q = attention.q_norm(attention.qkv(x)[..., :16])
        assert q.norm(dim=-1).max() <= 16**0.5 + 1e-4  # so no logit is above sqrt(d)
        torch.testing.assert_close(attention(x, *no_turn, 9), before, atol=2e-3, rtol=0)  # the norm's eps


@pytest.mark.parametrize("skip", SKIPS)
def test_skips_change_the_output_and_concatenation_alone_has_weights(skip: str) -> None:
    model = trained(skip=skip)
    assert any("skip_linear" in name for name, _ in model.named_parameters()) == (skip == "concat")
    with torch.no_grad():
        out = model(*inputs())
        model.has_skips = False
        if skip == "add":
            assert not torch.equal(model(*inputs()), out)
        elif skip == "none":
            assert torch.equal(model(*inputs()), out)


def test_sizes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="attention_head_dim 18 is not a multiple of 4"):
        new(attention_head_dim=18)
    with pytest.raises(ValueError, match="skip 'sum' is none of concat, add, none"):
        new(skip="sum")
    with pytest.raises(ValueError, match=r"9x9.*patch_size 2"):
        new(sample_size=9)
    with pytest.raises(ValueError, match=r"8x10.*8x8"):
        new()(*inputs(8, 10))
    latents, timestep, context = inputs()
    with pytest.raises(ValueError, match=r"6 tokens.* 7"):
        new()(latents, timestep, context[:, :6])


def test_gradient_checkpointing_changes_nothing() -> None:
    model = trained().train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("skip", SKIPS)
def test_saving_and_loading_keep_config_and_outputs(tmp_path: Path, skip: str) -> None:
    model = trained(sample_size=(8, 12), conv=False, skip=skip)
    model.save_pretrained(tmp_path)
    again = ModernUViTT2IModel.from_pretrained(tmp_path)
    assert isinstance(again, ModernUViTT2IModel) and again.config["skip"] == skip
    with torch.no_grad():
        assert torch.equal(again(*inputs(8, 12)), model(*inputs(8, 12)))


def test_every_token_matters() -> None:
    model = trained()
    latents, timestep, context = inputs()
    context.requires_grad_()
    model(latents, timestep, context).square().sum().backward()
    assert context.grad is not None
    assert context.grad.abs().amax(dim=-1).min() > 0
    with torch.no_grad():
        assert not torch.equal(model(latents, timestep, context), model(latents, timestep + 100, context))


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    model = trained()
    latents, timestep, context = inputs()
    with torch.no_grad():
        together = model(latents, timestep, context)
        alone = torch.cat([model(latents[i : i + 1], timestep[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)
