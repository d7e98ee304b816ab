"""Token ids become contexts: by a text encoder that is trained, or by the frozen one that stores are made with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from tests.tiny import tiny_text_encoder_folder
from tests.train.test_trainer import same
from uvit import UViTPipeline
from uvit.errors import UserError
from uvit.train.loader import prefetch
from uvit.train.setup import build_run
from uvit.train.step import batch_loss, encode_text, train_step
from uvit.train.trainer import train
from uvit.weights.encoders import encode_tokens


def test_the_text_encoder_is_made_for_the_model_and_the_tokenizer(tiny_config: Any, tmp_path: Path) -> None:
    run = build_run(tiny_config(train_text_encoder=True, text_encoder_layers=3), tmp_path)
    config = run.master_model["text_encoder"].config
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 3, 16)


def test_an_existing_text_encoder_is_trained_on(tiny_config: Any, encoders: tuple[Path, Path], tmp_path: Path) -> None:
    run = build_run(tiny_config(train_text_encoder=True, text_encoder_name_or_path=str(encoders[1])), tmp_path)
    assert all(parameter.requires_grad for parameter in run.master_model["text_encoder"].parameters())
    assert run.master_model["text_encoder"].config.num_hidden_layers == 2


def test_frozen_contexts_are_those_of_a_store(tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    """Up to the rounding to float16 that a store's contexts have been through: 11 bits."""
    stored = build_run(tiny_config(), tmp_path)
    encoded = build_run(tiny_config(feature_path=token_store), tmp_path)
    assert stored.frozen_text_encoder is None and encoded.frozen_text_encoder is not None
    assert list(encoded.master_model) == ["unet"]
    for one, other in zip(
        prefetch(stored.batches, range(8), 0, stored.device),
        prefetch(encoded.batches, range(8), 0, encoded.device),
        strict=True,
    ):
        assert one.context is not None and other.token_ids is not None
        context = encode_text(encoded, encoded.master_model, other.token_ids)  # of dropped captions too
        torch.testing.assert_close(context, one.context.float(), rtol=2**-11, atol=1e-7)
        assert batch_loss(encoded, other).item() == pytest.approx(batch_loss(stored, one).item(), rel=1e-3)


def test_training_on_token_ids_follows_training_on_contexts(tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    def trace(**flags: Any) -> list[float]:
        run = build_run(tiny_config(**flags), tmp_path)
        batches = prefetch(run.batches, range(20), 0, run.device)
        return [train_step(run, batches).loss for _ in range(20)]

    assert trace(feature_path=token_store) == pytest.approx(trace(), rel=1e-3)


def test_the_frozen_encoder_works_in_float32(tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    run = build_run(tiny_config(feature_path=token_store, bf16=True), tmp_path)
    ids = torch.arange(32).view(2, 16)
    with run.precision.autocast():
        context = encode_text(run, run.master_model, ids)
    assert context.dtype == torch.float32 and not context.requires_grad
    assert run.frozen_text_encoder is not None
    assert torch.equal(context, encode_tokens(run.frozen_text_encoder, ids, run.pad_token_id))


def test_checkpoints_leave_the_frozen_encoder_out_and_the_pipeline_has_it(
    tiny_config: Any, token_store: str, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    assert train(tiny_config(feature_path=token_store)) == 0
    checkpoint = tmp_path / "run" / "checkpoint-6"
    for name in ("weights", "ema"):
        assert all(key.startswith("unet.") for key in load_file(checkpoint / f"{name}.safetensors"))
    pipeline = UViTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    original = load_file(encoders[1] / "model.safetensors")
    saved = pipeline.text_encoder.state_dict()
    assert original.keys() == saved.keys() and all(torch.equal(saved[key], original[key]) for key in saved)
    config = json.loads((checkpoint / "uvit.json").read_text())
    assert config["text_encoder"] == str(encoders[1]) and config["text_encoder_config"] is None


def test_another_encoder_is_refused(tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    other = tiny_text_encoder_folder(tmp_path / "other", num_tokens=16, width=32, seed=1)
    with pytest.raises(
        UserError, match=rf"--text_encoder_name_or_path {other}: .*fingerprint is \w{{12}}, not \w{{12}}\)"
    ):
        build_run(tiny_config(feature_path=token_store, text_encoder_name_or_path=str(other)), tmp_path)


def test_an_encoder_that_nobody_knows_must_be_named(
    tiny_config: Any, edited_store: Callable[..., str], encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    unknown = edited_store(context_shape=None, text_encoder=None)
    with pytest.raises(
        UserError, match=r"--text_encoder_name_or_path, train one with --train_text_encoder, or extract"
    ):
        build_run(tiny_config(feature_path=unknown), tmp_path)
    run = build_run(tiny_config(feature_path=unknown, text_encoder_name_or_path=str(encoders[1])), tmp_path)
    assert run.frozen_text_encoder is not None
    assert run.record()["text_encoder_sha256"] == build_run(tiny_config(), tmp_path).record()["text_encoder_sha256"]


@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ({"width": 48}, {}, "the text embeddings are 48 wide, but the U-ViT takes 32"),
        ({"num_tokens": 8}, {}, "takes 8 tokens at most, but the U-ViT takes 16"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    train_text_encoder: bool,
    size: dict[str, int],
    changes: dict[str, Any],
    message: str,
    tiny_config: Any,
    edited_store: Callable[..., str],
    tmp_path: Path,
) -> None:
    other = str(tiny_text_encoder_folder(tmp_path / "other", **({"num_tokens": 16, "width": 32} | size)))
    config = tiny_config(
        feature_path=edited_store(context_shape=None, text_encoder=None),
        text_encoder_name_or_path=other,
        train_text_encoder=train_text_encoder,
    )
    with pytest.raises(UserError, match=message):
        build_run(config, tmp_path)


def bert_folder(path: Path, tokenizer: Path) -> str:
    config = BertConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(path)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, path)
    return str(path)


def test_another_kind_of_text_encoder_is_not_trained(
    tiny_config: Any, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    name = bert_folder(tmp_path / "bert", encoders[1])
    with pytest.raises(
        UserError, match=r"^--train_text_encoder: trains CLIP text encoders, .* of the kind bert; leave"
    ):
        train(tiny_config(train_text_encoder=True, text_encoder_name_or_path=name))


def test_a_text_encoder_is_trained_without_dropout(
    tiny_config: Any, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    """No checkpoint keeps the random numbers of dropout, so a resumed run would differ."""
    folder = tmp_path / "text"
    shutil.copytree(encoders[1], folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"attention_dropout": 0.5}))
    flags = {"train_text_encoder": True, "text_encoder_name_or_path": str(folder)}
    train(tiny_config(output_dir=str(tmp_path / "one"), **flags))
    for steps in (3, 6):
        train(tiny_config(max_steps=steps, **flags))
    assert same(tmp_path / "one" / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
