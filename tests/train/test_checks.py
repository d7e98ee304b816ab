"""Every contradiction between features, model, flags and encoders is a sentence before the first step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import TINY_MODEL
from uvit.data.features import open_features
from uvit.errors import UserError
from uvit.train.setup import set_up
from uvit.train.trainer import train

OTHER = {"name": "elsewhere", "sha256": "0123456789abcdef"}


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


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        (
            {"token_dtype": None},
            {"train_text_encoder": True},
            r"no token ids, which --train_text_encoder needs.*--text",
        ),
        ({"vae": OTHER}, {}, r"its split heldout was made by another VAE .*fingerprints 0123456789ab and \w{12}\)"),
        ({"text_encoder": OTHER}, {}, r"made by another text encoder"),
        ({"tokenizer": OTHER}, {"train_text_encoder": True}, r"made by another tokenizer"),
        ({"context_shape": None}, {}, r"has no contexts, as the training features do; extract"),
    ],
)
def test_features_to_validate_on_must_belong_to_those_to_train_on(
    fields: dict[str, Any],
    flags: dict[str, Any],
    message: str,
    tiny_config: Any,
    edited_store: Callable[..., str],
    tmp_path: Path,
) -> None:
    other = edited_store("heldout", **fields)
    with pytest.raises(UserError, match=f"--feature_path {other}: .*{message}"):
        set_up(tiny_config(feature_path=other, validation_split="heldout", **flags), tmp_path)
    with pytest.raises(UserError, match=f"--validation_feature_path {other}: .*{message}"):
        set_up(tiny_config(validation_feature_path=other, validation_split="heldout", **flags), tmp_path)


def test_a_trained_text_encoder_need_not_be_the_one_that_the_features_know(
    tiny_config: Any, edited_store: Callable[..., str], tmp_path: Path
) -> None:
    other = edited_store("heldout", text_encoder=OTHER)
    config = tiny_config(validation_feature_path=other, validation_split="heldout", train_text_encoder=True)
    assert set_up(config, tmp_path).validation is not None


def test_a_pipeline_to_start_from_must_have_the_encoders_of_the_features(
    tiny_config: Any, store: Path, edited_store: Callable[..., str], tmp_path: Path
) -> None:
    train(tiny_config(max_steps=1))
    pipeline = tmp_path / "run" / "pipeline"
    facts = json.loads((pipeline / "training.json").read_text())
    features = open_features(store)
    assert (facts["vae_sha256"], facts["text_encoder_sha256"]) == (features.vae_sha256, features.text_encoder_sha256)
    for name, what in {"vae": "VAE", "text_encoder": "text encoder"}.items():
        other = edited_store(**{name: OTHER})
        config = tiny_config(feature_path=other, pretrained_model_name_or_path=str(pipeline))
        with pytest.raises(UserError, match=f"--pretrained_model_name_or_path {pipeline}: its {what} is not the one"):
            set_up(config, tmp_path)
    assert set_up(tiny_config(pretrained_model_name_or_path=str(pipeline)), tmp_path)
