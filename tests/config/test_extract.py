import pytest

from uvit.config.extract import AutoencoderConfig, ExtractConfig
from uvit.errors import UserError


def config(**flags: object) -> ExtractConfig:
    return ExtractConfig(**({"source": "shapes", "output_dir": "out", "vae_name_or_path": "vae"} | flags))  # type: ignore[arg-type]


def test_contexts_need_a_text_encoder_and_tokens_do_not() -> None:
    with pytest.raises(UserError, match=r"^--text contexts: needs --text_encoder_name_or_path"):
        config()
    assert config(text="tokens").text == "tokens"
    assert config(text_encoder_name_or_path="clip").text == "contexts"


def test_a_vocabulary_is_built_only_where_no_tokenizer_is_given() -> None:
    assert config(text="tokens", vocab_size=512).vocab_size == 512
    with pytest.raises(UserError, match=r"^--vocab_size 512: no tokenizer is trained, because --tokenizer_name"):
        config(text="tokens", vocab_size=512, tokenizer_name="clip")


@pytest.mark.parametrize("name", ["resolution", "model_max_length", "batch_size", "shard_size"])
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} 0: must be (at least |in [13][.][.])"):
        config(text="tokens", **{name: 0})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("resolution", 30, "must be a multiple of --factor"),
        ("channels", 12, "must be a multiple of 8"),
        ("max_steps", 0, "must be at least 1"),
        ("batch_size", 0, "must be in 1..1,000,000"),
    ],
)
def test_an_autoencoder_that_cannot_be_built(name: str, value: int, reason: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} {value}: {reason}"):
        AutoencoderConfig(source="shapes", output_dir="out", **{name: value})
