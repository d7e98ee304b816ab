"""Each component of a pipeline, and of a run, replaced by one of another size: the command says so before it begins."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import CAPTIONS
from uvit.cli.main import main
from uvit.extract.tokenizer import train_tokenizer
from uvit.model import UViTT2IModel
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler

MODEL = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 8, "clip_dim": 32, "num_text_tokens": 16}  # fmt: skip
WORDS = [f"word{i} thing{7 * i}" for i in range(400)]


def build(part: str, **sizes: Any) -> Any:
    """A tiny component of the pipeline; `sizes` are what differs from the one that fits."""
    torch.manual_seed(0)
    if part == "unet":
        return UViTT2IModel(**(MODEL | sizes))
    if part == "tokenizer":
        return train_tokenizer(WORDS * 2 if sizes else CAPTIONS * 2, sizes.get("vocab_size", 320), 16)
    if part == "text_encoder":
        usual = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "max_position_embeddings": 16}  # fmt: skip
        return CLIPTextModel(CLIPTextConfig(**(usual | sizes), bos_token_id=1, eos_token_id=2, pad_token_id=0))
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8,) * 3, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        **({"latent_channels": 4} | sizes),
    )  # fmt: skip
    return vae


# A component of another size, and a part of the sentence.
MISFITS = [
    ("vqvae", {"latent_channels": 8}, "the VAE's latents have 8 channels, but the U-ViT takes 4"),
    ("text_encoder", {"hidden_size": 64}, "the text embeddings are 64 wide, but the U-ViT takes 32"),
    ("text_encoder", {"max_position_embeddings": 8}, "takes 8 tokens at most, but the U-ViT takes 16"),
    ("text_encoder", {"vocab_size": 300}, "the tokenizer has 320 tokens, but the text encoder has 300"),
    ("tokenizer", {"vocab_size": 500}, "the tokenizer has 500 tokens, but the text encoder has 320"),
    ("unet", {"in_channels": 8}, "the VAE's latents have 4 channels, but the U-ViT takes 8"),
    ("unet", {"clip_dim": 64}, "the text embeddings are 32 wide, but the U-ViT takes 64"),
    ("unet", {"num_text_tokens": 17}, "takes 16 tokens at most, but the U-ViT takes 17"),
]
FLAGS = {"vqvae": "vae_name_or_path", "text_encoder": "text_encoder_name_or_path", "tokenizer": "tokenizer_name"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, .npy features that fit it, and its model's config."""
    folder = tmp_path_factory.mktemp("made")
    parts = {part: build(part) for part in (*FLAGS, "unet")}
    UViTPipeline(**parts, scheduler=build_scheduler()).save_pretrained(folder / "pipeline")
    (folder / "npy" / "train").mkdir(parents=True)
    draws = np.random.default_rng(0)
    for i in range(4):
        np.save(folder / "npy" / "train" / f"{i}.npy", draws.standard_normal((8, 4, 4), np.float32))
        for k in range(2):
            np.save(folder / "npy" / "train" / f"{i}_{k}.npy", draws.standard_normal((16, 32), np.float32))
    np.save(folder / "npy" / "empty_context.npy", np.zeros((16, 32), np.float32))
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one sentence with which a command refuses, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        capsys.readouterr()
        assert main([*words]) == 2, words
        err = capsys.readouterr().err
        sentences = [line for line in err.splitlines() if "error" in line]
        assert len(sentences) == 1 and "Traceback" not in err, err
        assert not (tmp_path / "out").exists(), words
        return sentences[0]

    return call


TRAIN = "train --device cpu --max_steps 1 --warmup_steps 0 --per_device_train_batch_size 2 --output_dir out"


@pytest.mark.parametrize(("part", "sizes", "sentence"), MISFITS, ids=lambda value: str(value)[:30])
def test_a_component_of_another_size_is_named_before_the_work(
    part: str, sizes: dict[str, Any], sentence: str, made: Path, tmp_path: Path, refused: Any
) -> None:
    other, pipeline, good = tmp_path / "other", tmp_path / "pipeline", made / "pipeline"
    build(part, **sizes).save_pretrained(other)
    shutil.copytree(good, pipeline)
    shutil.rmtree(pipeline / part)
    shutil.copytree(other, pipeline / part)
    assert sentence in refused("sample", "a heart", "--pipeline", str(pipeline), "--output_dir", "out")
    assert sentence in refused("evaluate", str(pipeline), "--output_dir", "out")
    assert sentence in refused("convert", str(pipeline), "out")
    with pytest.raises(ValueError, match=sentence.replace("[", ".")):
        UViTPipeline.from_pretrained(pipeline)
    train = [*TRAIN.split(), "--feature_path", str(made / "npy"), "--uvit_config_file"]
    if part == "unet":
        (tmp_path / "other.json").write_text(json.dumps(MODEL | sizes))
        assert "--feature_path" in refused(*train, str(tmp_path / "other.json"))
    else:
        assert sentence in refused("convert", str(good), "out", f"--{FLAGS[part]}", str(other))
        words = [*train, str(made / "model.json")]
        for name, flag in FLAGS.items():
            words += [f"--{flag}", str(other if name == part else good)]
        assert sentence in refused(*words)
    assert refused(*train, str(made / "model.json"), "--pretrained_model_name_or_path", str(pipeline))


# .npy features, each with one thing wrong; {} is the folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


def save_two(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3), b=np.ones(3))


def save(*shape: int, dtype: str = "float32") -> Any:
    return lambda path: np.save(path, np.ones(shape, dtype))


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "a hole in the pairs": ("train/2.npy", Path.unlink, "train/2.npy is missing"),
    "a hole in the captions": ("train/2_0.npy", Path.unlink, "train/2_0.npy is missing"),
    "a pair without captions": ("train/4.npy", save(8, 4, 4), "train/4_0.npy is missing"),
    "another spelling of a number": (
        "train/2.npy",
        lambda path: path.rename(path.with_name("02.npy")),
        "2.npy is miss",
    ),
    "no empty context": ("empty_context.npy", Path.unlink, "has no empty_context.npy"),
    "another empty context": ("empty_context.npy", save(16, 33), "empty_context.npy has shape (16, 33)"),
    "cut off": ("train/3.npy", cut, "train/3.npy cannot be read"),
    "a cut caption": ("train/3_1.npy", cut, "train/3_1.npy cannot be read"),
    "an empty file": ("train/3.npy", lambda path: path.write_bytes(b""), "train/3.npy cannot be read"),
    "another shape": ("train/3.npy", save(8, 4, 5), "train/3.npy has shape (8, 4, 5)"),
    "fewer tokens": ("train/3_1.npy", save(15, 32), "train/3_1.npy has shape (15, 32)"),
    "one axis": ("train/0.npy", save(128), "train/0.npy has shape (128,), which must have 3 axes"),
    "a number": ("train/0.npy", save(), "train/0.npy has shape ()"),
    "no pixels": ("train/0.npy", save(8, 0, 4), "train/0.npy has shape (8, 0, 4)"),
    "text": ("train/3.npy", save(8, 4, 4, dtype="U1"), "train/3.npy holds <U1"),
    "complex numbers": ("train/3_1.npy", save(16, 32, dtype="complex64"), "train/3_1.npy holds complex64"),
    "several arrays": (
        "train/3.npy",
        save_two,
        "3.npy holds several arrays",
    ),
    "half of several": (
        "train/3.npy",
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)),
        "3.npy cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_npy_features_are_checked_before_the_first_step(damage: str, made: Path, tmp_path: Path, refused: Any) -> None:
    name, spoil, sentence = DAMAGE[damage]
    shutil.copytree(made / "npy", tmp_path / "npy")
    spoil(tmp_path / "npy" / name)
    words = [*TRAIN.split(), "--feature_path", str(tmp_path / "npy"), "--uvit_config_file", str(made / "model.json")]
    message = refused(*words)
    assert "--feature_path" in message and sentence in message


def test_what_fits_trains(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three flags, and arrays of other types, which are numbers too."""
    shutil.copytree(made / "npy", tmp_path / "npy")
    np.save(tmp_path / "npy" / "train" / "3.npy", np.ones((8, 4, 4), np.float16))
    np.save(tmp_path / "npy" / "train" / "3_0.npy", np.ones((16, 32), np.float64))
    monkeypatch.chdir(tmp_path)
    words = [*TRAIN.split(), "--feature_path", "npy", "--uvit_config_file", str(made / "model.json")]
    for flag in FLAGS.values():
        words += [f"--{flag}", str(made / "pipeline")]
    assert main([*words, "--image_logging_steps", "-1", "--latent_scale", "1"]) == 0
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


def test_a_hub_id_that_is_not_here_is_a_warning(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Training needs no encoders, and the machine that trains may not reach the Hub."""
    monkeypatch.chdir(tmp_path)
    words = [*TRAIN.split(), "--feature_path", str(made / "npy"), "--uvit_config_file", str(made / "model.json")]
    assert main([*words, "--image_logging_steps", "-1", "--tokenizer_name", "nobody/no-such-tokenizer"]) == 0
    said = capsys.readouterr().out
    assert "warning: --tokenizer_name nobody/no-such-tokenizer: " in said and "no pipeline can be written" in said
