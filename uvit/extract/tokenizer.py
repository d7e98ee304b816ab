"""Train a tokenizer on captions: byte-level BPE, for any language."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from uvit.config.extract import TokenizerConfig
from uvit.errors import UserError, differences
from uvit.io import write_folder_atomically
from uvit.sources.open import open_given

PAD, START_TOKEN, END_TOKEN = "<|pad|>", "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, model_max_length: int = 77) -> PreTrainedTokenizerFast:
    """Learn at most `vocab_size` tokens from captions. The order of the captions does not change the result.

    Captions are lower-cased and converted to Unicode's composed form (NFC). No text is unknown: each byte is a token.
    The vocabulary has at least every byte and the three special tokens, however small `vocab_size` is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    # With the prefix space, a word is the same token at the start of a caption and within it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, START_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_TOKEN} $A {END_TOKEN}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START_TOKEN, END_TOKEN)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD,
        model_max_length=model_max_length,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder completely or not at all. Does nothing if it already contains this tokenizer.

    Raises UserError if it contains anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with write_folder_atomically(folder) as aside:
            tokenizer.save_pretrained(aside)
        return
    with tempfile.TemporaryDirectory() as other:
        tokenizer.save_pretrained(other)
        before, now = _content(folder), _content(Path(other))
    if before != now:
        known = (
            {"tokens": len(tokens.get("model", {}).get("vocab", ())), **settings} for tokens, settings in (before, now)
        )
        raise UserError(
            f"--output_dir {folder}: contains another tokenizer; choose another folder, or move this one away",
            list(differences(next(known), next(known)).values()),
        )


def _content(folder: Path) -> list[dict[str, Any]]:
    files = (folder / "tokenizer.json", folder / "tokenizer_config.json")
    try:
        return [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files]
    except ValueError as error:
        raise UserError(
            f"--output_dir {folder}: its tokenizer is damaged ({error}); choose another folder, or move this one away"
        ) from None


def build_tokenizer(config: TokenizerConfig) -> None:
    """The command `uvit tokenizer`."""
    source = open_given(config)
    num_captions = 0

    def counted() -> Iterator[str]:
        nonlocal num_captions
        for num_captions, caption in enumerate(source.all_captions(), start=1):  # noqa: B007
            yield caption

    tokenizer = train_tokenizer(counted(), config.vocab_size, config.model_max_length)
    if not num_captions:
        raise UserError(f"--source {config.source[0]}: has no usable caption")
    folder = Path(config.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    print(f"Tokenizer of {len(tokenizer):,} tokens from {num_captions:,} captions: {folder}")
