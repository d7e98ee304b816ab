"""Every contradiction between features, model and flags is a sentence before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import TINY_MODEL
from uvit.errors import UserError
from uvit.train.setup import set_up


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"in_channels": 8}, {}, r"latents of 4 channels, the model 8"),
        ({"sample_size": 2}, {}, r"latents of 4x4, the model's sample_size is 2x2"),
        ({"clip_dim": 48}, {}, r"contexts of width 32, the model's clip_dim is 48"),
        ({"num_text_tokens": 20}, {}, r"16 context tokens.*num_text_tokens is 20.*--model_max_length 20"),
        ({"num_text_tokens": 20}, {"train_text_encoder": True}, r"16 token ids.*num_text_tokens is 20"),
        ({}, {"model_max_length": 77}, r"--model_max_length 77: the features have 16"),
        ({}, {"resolution": 256}, r"--resolution 256: the features were extracted at 16"),
        ({}, {"feature_path": "/nowhere"}, r"--feature_path /nowhere"),
        ({}, {"device": "cuda:99"}, r"--device cuda:99"),
        ({}, {"pretrained_model_name_or_path": "/nowhere"}, r"--pretrained_model_name_or_path /nowhere"),
    ],
)
def test_contradictions(
    changes: dict[str, Any], flags: dict[str, Any], message: str, tiny_config: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY_MODEL | changes))
    with pytest.raises(UserError, match=message):
        set_up(tiny_config(uvit_config_file=str(path), **flags), tmp_path)


def test_epochs_count_instead_of_steps(tiny_config: Any, tmp_path: Path) -> None:
    run = set_up(tiny_config(num_train_epochs=2.5), tmp_path)
    assert run.max_steps == 45 and run.samples_per_step == 4  # 72 pairs


def test_the_seed_makes_the_weights(tiny_config: Any, tmp_path: Path) -> None:
    one, same, other = (set_up(tiny_config(seed=seed), tmp_path).networks.state_dict() for seed in (1, 1, 2))
    assert all((one[key] == same[key]).all() for key in one)
    assert any((one[key] != other[key]).any() for key in one)


def test_a_wider_initialisation(tiny_config: Any, tmp_path: Path) -> None:
    plain, wide = (
        set_up(tiny_config(**flags), tmp_path).networks["unet"]
        for flags in ({}, {"weight_init_std": 0.06, "position_init_std": 0.5})
    )
    torch.testing.assert_close(wide.mid_block.mlp.fc1.weight, 3 * plain.mid_block.mlp.fc1.weight)
    torch.testing.assert_close(wide.pos_embed, 25 * plain.pos_embed)
    assert torch.equal(wide.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    with pytest.raises(UserError, match="--weight_init_std and --position_init_std are for fresh weights"):
        tiny_config(weight_init_std=0.06, pretrained_model_name_or_path="x")


def test_the_text_encoder_is_made_for_the_model_and_the_tokenizer(tiny_config: Any, tmp_path: Path) -> None:
    run = set_up(tiny_config(train_text_encoder=True, text_encoder_layers=3), tmp_path)
    config = run.networks["text_encoder"].config
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 3, 16)


def test_an_existing_text_encoder_is_trained_on(tiny_config: Any, encoders: tuple[Path, Path], tmp_path: Path) -> None:
    run = set_up(tiny_config(train_text_encoder=True, text_encoder_name_or_path=str(encoders[1])), tmp_path)
    assert all(parameter.requires_grad for parameter in run.networks["text_encoder"].parameters())
    assert run.networks["text_encoder"].config.num_hidden_layers == 2
