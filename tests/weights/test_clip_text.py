"""Reading a CLIP text encoder without `from_pretrained` gives what `from_pretrained` gives, or nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from uvit.weights.clip_text import read_clip_text
from uvit.weights.encoders import load_transformers_encoder

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, layer_norm_eps=1e-3, hidden_act="gelu",
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_model_of_from_pretrained(folder: Path, dtype: torch.dtype) -> None:
    before = torch.random.get_rng_state()
    found = read_clip_text(folder, dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = CLIPTextModel.from_pretrained(folder, dtype=dtype)
    assert found is not None
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.config._attn_implementation == expected.config._attn_implementation
    assert (found.training, found.dtype, found.name_or_path) == (False, dtype, expected.name_or_path)
    for tensors, others in (
        (found.state_dict(), expected.state_dict()),
        (dict(found.named_buffers()), dict(expected.named_buffers())),
    ):
        assert list(tensors) == list(others)
        assert all(torch.equal(tensors[name], others[name]) for name in others)
        assert all(tensors[name].dtype == others[name].dtype for name in others)
    token_ids = torch.arange(9)[None]
    assert torch.equal(found(token_ids).last_hidden_state, expected(token_ids).last_hidden_state)


def test_what_is_not_exactly_that_is_left_to_from_pretrained(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "final_layer_norm.bias"
    for other in (
        {f"text_model.{key}": value for key, value in tensors.items()},  # as older versions wrote it
        {key: value for key, value in tensors.items() if key != name},
        {**tensors, "more": torch.zeros(1)},
        {**tensors, name: torch.zeros(3)},
        {**tensors, name: torch.zeros(16, dtype=torch.int64)},
    ):
        save_file(other, folder / WEIGHTS, {"format": "pt"})
        assert read_clip_text(folder, torch.float32) is None
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    assert read_clip_text(folder, torch.float32) is None
    (folder / WEIGHTS).unlink()
    assert read_clip_text(folder, torch.float32) is None
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = (folder / "config.json").read_text()
    for text in (config.replace("clip_text_model", "t5"), config.replace("16", '"wide"'), "[]", "{"):
        (folder / "config.json").write_text(text)
        assert read_clip_text(folder, torch.float32) is None


def test_weights_under_older_names_still_load(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({f"text_model.{key}": value for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    found = load_transformers_encoder(str(folder)).state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
