"""A tokenizer built from captions reads any language and does not depend on their order."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.sources.pictures import write_table, write_tar
from tests.tiny import CAPTIONS
from uvit.config.extract import TokenizerConfig
from uvit.errors import UserError
from uvit.extract.tokenizer import build_tokenizer, train_tokenizer
from uvit.weights.encoders import tokenize


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS * 2, 400, model_max_length=12)


def test_start_and_end_surround_the_words_and_padding_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len({start, end, pad}) == 3
    ids = tokenize(tokenizer, ["red circle", "", "red " * 50], 12)
    assert ids.shape == (3, 12)
    assert ids[0].tolist()[0] == start
    assert ids[0].tolist().count(end) == 1
    assert ids[1].tolist() == [start, end] + [pad] * 10
    assert ids[2].tolist()[0] == start
    assert ids[2].tolist()[-1] == end


def test_words_of_the_captions_are_tokens_wherever_they_stand(tokenizer: PreTrainedTokenizerFast) -> None:
    red = tokenizer("red")["input_ids"]
    assert len(red) == 3
    assert tokenizer("RED   red\nred")["input_ids"] == [red[0], red[1], red[1], red[1], red[2]]
    assert len(tokenizer("一个红色的圆")["input_ids"]) == 3
    assert tokenizer("cafe\u0301")["input_ids"] == tokenizer("café")["input_ids"]


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_any_text_survives_but_for_case_and_spaces(text: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    ids = tokenizer(text)["input_ids"]
    plain = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    if not any(marker in plain for marker in ("<|", "|>")):
        assert (
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() == plain.strip()
        )


def test_the_same_captions_in_any_order_give_the_same_tokens() -> None:
    first = train_tokenizer(CAPTIONS, 300).backend_tokenizer.to_str()
    assert train_tokenizer(CAPTIONS[::-1], 300).backend_tokenizer.to_str() == first


def test_a_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(UserError, match=r"--vocab_size 258: must be in 259\.\.10,000,000; one for each byte"):
        TokenizerConfig(("shapes",), "tokenizer", vocab_size=258)
    assert len(train_tokenizer(CAPTIONS, 259)) == 259


def test_the_command_writes_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    config = TokenizerConfig(("shapes",), str(tmp_path / "deep" / "tokenizer"), vocab_size=500, model_max_length=24)
    build_tokenizer(config)
    opened = AutoTokenizer.from_pretrained(config.output_dir)
    assert opened.model_max_length == 24
    assert (opened.bos_token, opened.eos_token, opened.pad_token) == (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|pad|>",
    )
    ids = opened("a red circle")["input_ids"]
    assert (ids[0], ids[-1]) == (opened.bos_token_id, opened.eos_token_id)
    build_tokenizer(config)  # the same again: nothing to do
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokenizer"]
    with pytest.raises(UserError, match="--output_dir"):
        build_tokenizer(TokenizerConfig(("shapes",), config.output_dir, vocab_size=300))
    (tmp_path / "empty").mkdir()
    build_tokenizer(replace(config, output_dir=str(tmp_path / "empty")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "empty")) == len(opened)
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"--output_dir .*empty: its tokenizer is damaged"):
        build_tokenizer(replace(config, output_dir=str(tmp_path / "empty")))


def test_captions_by_column_and_none_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").touch()
    path = write_table(tmp_path / "list.csv", [("a.png", "x" * 50, "red")] * 3, ("image", "alt", "text"))
    config = TokenizerConfig((str(path),), str(tmp_path / "t"), caption_column="alt")
    build_tokenizer(config)
    assert "from 3 captions" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir)
    assert len(tokenizer("x" * 32)["input_ids"]) < len(tokenizer("red")["input_ids"]) + 2
    tar = write_tar(tmp_path / "0.tar", [("a.txt", b" "), ("a.png", b"")])
    with pytest.raises(UserError, match=r"0\.tar: has no usable caption"):
        build_tokenizer(TokenizerConfig((str(tar),), str(tmp_path / "none")))
