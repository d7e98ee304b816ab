"""A store names what decided its content, and nothing that may change between two runs of one extraction."""

from pathlib import Path
from typing import Any

import pytest

from uvit.config.extract import ExtractConfig
from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.extract.provenance import describe_store, find_tokenizer, scale_reason
from uvit.extract.tokenizer import save_tokenizer
from uvit.sources.shapes import ShapesSource
from uvit.store.writer import StoreInfo, StoreWriter
from uvit.weights.encoders import load_diffusers_vae, load_tokenizer

SOURCE = ShapesSource("train", 16)


@pytest.fixture
def flags(vae_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "source": ("shapes",),
        "output_dir": str(tmp_path / "store"),
        "vae_name_or_path": str(vae_folder),
        "text": "tokens",
        "resolution": 16,
        "vocab_size": 300,
    }


def described(flags: dict[str, Any]) -> StoreInfo:
    config = ExtractConfig(**flags)
    tokenizer, record = find_tokenizer(config, SOURCE, Path(config.output_dir) / config.split)
    return describe_store(
        config, SOURCE, load_diffusers_vae(config.vae_name_or_path), None, tokenizer, record, LatentSpace(0.5)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 24},
        {"crop": "pad"},
        {"resize": "box"},
        {"icc": "ignore"},
        {"min_image_size": 8},
        {"on_error": "stop"},
        {"val_every": 10},
        {"random_flip": True},
        {"bf16": True},
        {"vocab_size": 280},
        {"model_max_length": 20},
        {"dtype": "float32"},
        {"shard_size": 9},
    ],
)
def test_what_changes_the_content_is_recorded(flags: dict[str, Any], change: dict[str, Any]) -> None:
    assert described(flags) != described(flags | change)


def test_what_does_not_is_not(flags: dict[str, Any]) -> None:
    other = {"batch_size": 3, "num_workers": 0, "device": "cpu", "shard": "0/2", "disable_tqdm": True}
    assert described(flags) == described(flags | other)


def test_a_tokenizer_is_given_or_that_of_another_split_or_new(flags: dict[str, Any], tmp_path: Path) -> None:
    config = ExtractConfig(**flags)
    built, record = find_tokenizer(config, SOURCE, tmp_path / "store" / "train")
    assert (len(built), record["name"]) == (300, "built from the captions of shapes")
    save_tokenizer(built, tmp_path / "given")
    _, given = find_tokenizer(
        ExtractConfig(**flags | {"tokenizer_name": str(tmp_path / "given"), "vocab_size": None}),
        SOURCE,
        tmp_path / "store" / "train",
    )
    assert given == {"name": str(tmp_path / "given"), "sha256": record["sha256"]}

    StoreWriter(tmp_path / "store" / "other", described(flags | {"split": "other", "vocab_size": 290}))
    other = load_tokenizer(str(tmp_path / "given"))
    save_tokenizer(other, tmp_path / "store" / "other" / "tokenizer")
    assert find_tokenizer(config, SOURCE, tmp_path / "store" / "val")[1] == record
    with pytest.raises(UserError, match=r"--vocab_size 299: .*other.tokenizer has 300 tokens"):
        find_tokenizer(ExtractConfig(**flags | {"vocab_size": 299}), SOURCE, tmp_path / "store" / "val")


def test_why_a_latent_scale_is_what_it_is(flags: dict[str, Any]) -> None:
    vae = load_diffusers_vae(flags["vae_name_or_path"])
    assert scale_reason(ExtractConfig(**flags), vae, LatentSpace(0.5)) == "stored with the VAE"
    assert scale_reason(ExtractConfig(**flags, latent_scale=0.7), vae, LatentSpace(0.7)) == "from --latent_scale"
    assert scale_reason(ExtractConfig(**flags), vae, LatentSpace(0.23)).startswith("U-ViT's value")
