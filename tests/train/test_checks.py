"""Every contradiction between features, model, flags and encoders is a sentence before the first step."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import array_features
from tests.train.conftest import TINY_MODEL
from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.store.reader import open_features
from uvit.train.checks import check_latents
from uvit.train.setup import build_run
from uvit.train.trainer import train

OTHER = {"name": "elsewhere", "sha256": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"in_channels": 8}, {}, r"its latents have 4 channels, and the model's have 8"),
        ({"sample_size": 2}, {}, r"its latents are 4x4, and the model's sample_size is 2x2"),
        ({"clip_dim": 48}, {}, r"its text embeddings have width 32, and the model's clip_dim is 48"),
        ({"num_text_tokens": 20}, {}, r"16 text embeddings per caption.*num_text_tokens is 20.*--model_max_length 20"),
        ({"num_text_tokens": 20}, {"train_text_encoder": True}, r"16 token ids per caption.*num_text_tokens is 20"),
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
        build_run(tiny_config(uvit_config_file=str(path), **flags), tmp_path)


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        (
            {"token_dtype": None},
            {"train_text_encoder": True},
            r"no token ids, which --train_text_encoder needs.*--text",
        ),
        (
            {"vae": OTHER},
            {},
            r"its split heldout was made by other encoders .*\n  fingerprint of the VAE: of the training ",
        ),
        ({"text_encoder": OTHER}, {}, r"made by other encoders .*\n  fingerprint of the text encoder: of"),
        (
            {"tokenizer": OTHER},
            {"train_text_encoder": True},
            r"made by other encoders .*\n  fingerprint of the tokenizer: of",
        ),
        ({"context_shape": None}, {}, r"has no text embeddings, but the training features have; extract"),
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
        build_run(tiny_config(feature_path=other, validation_split="heldout", **flags), tmp_path)
    with pytest.raises(UserError, match=f"--validation_feature_path {other}: .*{message}"):
        build_run(tiny_config(validation_feature_path=other, validation_split="heldout", **flags), tmp_path)


def test_a_trained_text_encoder_need_not_be_the_one_that_the_features_know(
    tiny_config: Any, edited_store: Callable[..., str], tmp_path: Path
) -> None:
    other = edited_store("heldout", text_encoder=OTHER)
    config = tiny_config(validation_feature_path=other, validation_split="heldout", train_text_encoder=True)
    assert build_run(config, tmp_path).validation is not None


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
        with pytest.raises(
            UserError,
            match=rf"{pipeline}: its encoders did not make .*\n  fingerprint of the {what}: of the pipeline",
        ):
            build_run(config, tmp_path)
    assert build_run(tiny_config(pretrained_model_name_or_path=str(pipeline)), tmp_path)
    (pipeline / "training.json").write_text(json.dumps(facts | {"timestep_labels": "0..999"}))
    with pytest.raises(UserError, match=r"was trained with timesteps 0\.\.999, but this training uses 1\.\.1000"):
        build_run(tiny_config(pretrained_model_name_or_path=str(pipeline)), tmp_path)


def test_latents_of_an_unusual_size_are_warned_of(tiny_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    features = open_features(tiny_config().feature_path)
    means = features.read(np.arange(648), np.zeros(648)).moments[:, :4].astype(np.float64)
    check_latents(features, LatentSpace(1 / means.std()), "somewhere")
    assert capsys.readouterr().out == ""
    check_latents(features, LatentSpace(10 / means.std()), "somewhere")
    said = capsys.readouterr().out
    found = re.search(
        r"64 samples times the latent scale (\S+) .* deviation of (\S+), .*--latent_scale (\S+) would", said
    )
    assert found is not None
    scale, size, better = map(float, found.groups())
    assert scale == pytest.approx(10 / means.std(), rel=1e-3)
    assert size == pytest.approx(10, rel=0.1) and better == pytest.approx(1 / means.std(), rel=0.1)  # of 64 of them


def test_latents_that_are_all_alike_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    features = array_features(num_samples=1)
    check_latents(features, LatentSpace(1.0), "somewhere")
    assert "--feature_path somewhere: the latents of 1 samples are all equal" in capsys.readouterr().out
    features = array_features(num_samples=2)
    features.moments = np.where(features.moments > 0, features.moments, np.inf)
    check_latents(features, LatentSpace(1.0), "somewhere")
    assert "the latents of 2 samples are all equal or not finite" in capsys.readouterr().out
