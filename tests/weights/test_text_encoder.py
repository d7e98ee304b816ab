"""A CLIP text encoder under each of its names, in either layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from tests.port import same
from uvit.errors import UserError
from uvit.weights.report import Report
from uvit.weights.text_encoder import (
    non_default_text_config,
    paddlenlp_name,
    text_encoder_from_tensors,
    transformers_name,
    transpose_text_encoder,
)

PATH = Path("model_state.pdparams")
SETTINGS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 9,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
}


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**SETTINGS))


@pytest.mark.parametrize("paddle", [False, True])
@pytest.mark.parametrize("rename", [lambda name: name, lambda name: f"text_model.{name}", paddlenlp_name])
@pytest.mark.parametrize("known", [None, SETTINGS])
def test_names_and_layouts(encoder: CLIPTextModel, rename: Any, paddle: bool, known: Any) -> None:
    weights = transpose_text_encoder(encoder.state_dict()) if paddle else dict(encoder.state_dict())
    renamed = {rename(name): value for name, value in weights.items()}
    assert {transformers_name(name) for name in renamed} == set(weights)
    report = Report()
    positions = {"text_model.embeddings.position_ids": torch.arange(9)}
    again = text_encoder_from_tensors(renamed | positions, PATH, known, report)
    assert same(again.state_dict(), encoder.state_dict())
    assert all(getattr(again.config, name) == value for name, value in SETTINGS.items() if "token_id" not in name)
    assert bool(report.defaulted) is (known is None) and bool(report.converted) is paddle and report.dropped


def test_paddlenlps_names() -> None:
    names = {
        "embeddings.position_embedding.weight": "text_model.positional_embedding.weight",
        "encoder.layers.3.self_attn.q_proj.bias": "text_model.transformer.layers.3.self_attn.q_proj.bias",
        "encoder.layers.0.mlp.fc2.weight": "text_model.transformer.layers.0.linear2.weight",
        "encoder.layers.0.layer_norm1.weight": "text_model.transformer.layers.0.norm1.weight",
        "final_layer_norm.bias": "text_model.ln_final.bias",
    }
    assert {name: paddlenlp_name(name) for name in names} == names


def test_what_arrays_do_not_tell(encoder: CLIPTextModel) -> None:
    assert non_default_text_config(encoder) == []
    other = CLIPTextModel(CLIPTextConfig(**SETTINGS | {"num_attention_heads": 4, "hidden_act": "gelu"}))
    assert non_default_text_config(other) == [
        "num_attention_heads 4 (where 1 is assumed)",
        "hidden_act gelu (where quick_gelu is assumed)",
    ]


def test_what_is_not_whole(encoder: CLIPTextModel) -> None:
    weights = dict(encoder.state_dict())
    with pytest.raises(UserError, match="1 arrays of the text encoder are missing"):
        text_encoder_from_tensors(
            {k: v for k, v in weights.items() if k != "final_layer_norm.bias"}, PATH, None, Report()
        )
    with pytest.raises(UserError, match=r"position_embedding\.weight' is missing"):
        text_encoder_from_tensors({k: v for k, v in weights.items() if "position" not in k}, PATH, None, Report())
    narrow = {k: v[..., :48] if "embedding" in k else v for k, v in weights.items()}
    with pytest.raises(UserError, match=r"width 48, which is not a multiple of 64; put its config\.json beside it"):
        text_encoder_from_tensors(narrow, PATH, None, Report())
