"""Flags of `uvit extract` and `uvit tokenizer`."""

from dataclasses import dataclass
from typing import Literal

from uvit.errors import UserError


def _at_least(flag: str, value: int | float | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"--{flag} {value}: must be at least {least}")


@dataclass(frozen=True)
class ExtractConfig:
    """Encode captioned images into a feature store, so that training needs neither VAE nor text encoder.

    Stop it at any time: the same command goes on where it stopped.
    """

    source: str
    """Where the pairs are: `shapes` or `shapes:two` (built in), a WebDataset .tar, a COCO captions .json
    (with --image_folder), a COCO root folder, or a folder with metadata.jsonl."""
    output_dir: str
    """The feature store to write: a folder that is new, or holds the same extraction half done."""
    vae_name_or_path: str
    """An AutoencoderKL: its folder, a pipeline folder or a hub id."""
    text_encoder_name_or_path: str | None = None
    """A CLIP, T5 or BERT-like text encoder: its folder, a pipeline folder or a hub id. For contexts."""
    tokenizer_name: str | None = None
    """A tokenizer's folder or hub id. Default: the text encoder's; else one built from the captions."""
    text: Literal["contexts", "tokens", "both"] = "contexts"
    """What to keep of the captions: the text encoder's last hidden states; token ids, to train a text encoder
    jointly; or both."""
    vocab_size: int | None = None
    """Size of the tokenizer built from the captions (8192 where not given)."""
    split: str = "train"
    """Which part of the source: shapes have `train` and `heldout`, folders what they are named."""
    image_folder: str | None = None
    """The images of a COCO captions file."""
    resolution: int = 256
    """Images are centre-cropped to a square and scaled to this many pixels a side."""
    model_max_length: int = 77
    """Captions are padded or cut to this many tokens."""
    latent_scale: float | None = None
    """Factor from VAE latents to the model's. Default: the VAE's own; 0.2301 for a Stable Diffusion VAE."""
    batch_size: int = 32
    """Images (and captions) encoded at a time."""
    dtype: Literal["float16", "float32"] = "float16"
    """In which moments and contexts are stored."""
    shard_size: int = 1024
    """Pairs in each file of the store, which is also what a stopped extraction may have to do again."""
    num_workers: int = 2
    """Processes that decode images; 0 decodes in the main one."""
    device: str = "auto"
    """Where the encoders run: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        for flag in ("resolution", "model_max_length", "batch_size", "shard_size"):
            _at_least(flag, getattr(self, flag), 1)
        _at_least("num_workers", self.num_workers, 0)
        if self.latent_scale is not None and not self.latent_scale > 0:
            raise UserError(f"--latent_scale {self.latent_scale}: must be above 0")
        if self.text != "tokens" and not self.text_encoder_name_or_path:
            raise UserError(f"--text {self.text}: needs --text_encoder_name_or_path; --text tokens does not")
        given = "tokenizer_name" if self.tokenizer_name else "text_encoder_name_or_path"
        if self.vocab_size is not None and (self.tokenizer_name or self.text_encoder_name_or_path):
            raise UserError(f"--vocab_size {self.vocab_size}: no tokenizer is built where --{given} has one")


@dataclass(frozen=True)
class TokenizerConfig:
    """Build a tokenizer (byte-level BPE, any language, lower-cased) from a source's captions."""

    source: str
    """Where the captions are: a source as in `uvit extract`."""
    output_dir: str
    """The folder to write, which transformers' AutoTokenizer opens."""
    split: str = "train"
    """Which part of the source."""
    image_folder: str | None = None
    """The images of a COCO captions file."""
    vocab_size: int = 8192
    """Tokens at most; captions of few words need fewer."""
    model_max_length: int = 77
    """Tokens of the longest caption, start and end included, that the tokenizer says it takes."""

    def __post_init__(self) -> None:
        _at_least("model_max_length", self.model_max_length, 3)
