"""Flags of `uvit autoencoder`, `uvit tokenizer` and `uvit extract`: all that comes before training."""

import re
from dataclasses import dataclass
from typing import Literal

from uvit.config.sharding import parse_shard
from uvit.errors import UserError


def _at_least(flag: str, value: int | float | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"--{flag} {value}: must be at least {least}")


def check_split(split: str) -> None:
    """A split is the name of a folder."""
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"--split {split}: must be a plain name, such as train or val")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Train a first stage, an AutoencoderKL, on the images of a source."""

    source: tuple[str, ...]
    """The images: shapes, shapes:two, a .tar, a COCO folder or captions file, a folder with metadata.jsonl."""
    output_dir: str
    """The folder to write: opens with diffusers' AutoencoderKL and as --vae_name_or_path."""
    split: str = "train"
    """Which split of the source."""
    image_folder: tuple[str, ...] = ()
    """The images of a COCO captions file."""
    resolution: int = 64
    """Side of the square images, in pixels."""
    factor: Literal[4, 8] = 8
    """How many times smaller than the image the latents are, a side."""
    channels: int = 32
    """Width of the first level; the deeper ones have twice that."""
    layers_per_block: int = 1
    """Residual layers a level."""
    latent_channels: int = 4
    """Channels of the latents; the U-ViT's in_channels."""
    max_steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it warms up over 100 steps and falls to zero as a cosine."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence, mean over latents, beside the squared error, mean over pixels."""
    ema_decay: float = 0.995
    """Decay of the averaged weights, which are what is written."""
    preview_steps: int = 1000
    """Steps between pictures of reconstructions, in OUTPUT_DIR/previews; -1: only at the end."""
    num_workers: int = 0
    """Processes that decode images."""
    seed: int = 1234
    """Seed of the weights, the batches and the posterior draws."""
    bf16: bool = False
    """Compute in bfloat16 over float32 weights; faster on GPUs, and on CPUs with instructions for it."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    overwrite_output_dir: bool = False
    """Write into an OUTPUT_DIR that holds an autoencoder already; the old one is kept under another name."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if self.resolution % self.factor:
            raise UserError(f"--resolution {self.resolution}: must be a multiple of --factor {self.factor}")
        for name in ("max_steps", "batch_size", "channels", "layers_per_block", "latent_channels", "resolution"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.channels % 8:
            raise UserError(f"--channels {self.channels}: must be a multiple of 8, for group normalisation")


@dataclass(frozen=True)
class TokenizerConfig:
    """Build a tokenizer (byte-level BPE, any language, lower-cased) from a source's captions."""

    source: tuple[str, ...]
    """Where the captions are: a source as in `uvit extract`."""
    output_dir: str
    """The folder to write, which transformers' AutoTokenizer opens."""
    split: str = "train"
    """Which part of the source."""
    image_folder: tuple[str, ...] = ()
    """The images of COCO captions files or of lists."""
    caption_column: str | None = None
    """The captions in a list or Hugging Face dataset."""
    vocab_size: int = 8192
    """Tokens at most; captions of few words need fewer."""
    model_max_length: int = 77
    """Tokens of the longest caption, start and end included, that the tokenizer says it takes."""

    def __post_init__(self) -> None:
        _at_least("model_max_length", self.model_max_length, 3)


@dataclass(frozen=True)
class ExtractConfig:
    """Encode captioned images into a feature store, so that training needs neither VAE nor text encoder.

    Stop it at any time: the same command goes on where it stopped.
    """

    source: tuple[str, ...]
    """Where the pairs are, one place or several that follow one another: `shapes` or `shapes:two` (built in);
    WebDataset .tar files, also as a{000..099}.tar and by URL; a COCO captions .json (with --image_folder) or a COCO
    root folder; a folder with metadata.jsonl; a .csv, .tsv or .parquet list of image paths and captions; a Hugging
    Face dataset, as a folder, .parquet files or hf:HUB_ID."""
    output_dir: str
    """The feature store to write; the split becomes a folder in it. New, or with the same extraction half done."""
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
    """Which part of the source: shapes have `train` and `heldout`, folders what they are named. Also the name of the
    split in the feature store."""
    val_every: int | None = None
    """Of a source without parts, let each so-manieth pair be --split val and the others --split train."""
    image_folder: tuple[str, ...] = ()
    """The images of COCO captions files or of lists: one folder, or one for each of them."""
    image_column: str | None = None
    """The images, or their paths, in a list or Hugging Face dataset. Default: the first of the usual names."""
    caption_column: str | None = None
    """The captions there: a string or a list of strings in each row. Default: the first of the usual names."""
    streaming: bool = False
    """Read a Hugging Face dataset as it comes over the network instead of downloading it first."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do about broken, tiny or missing images, empty captions and ids that come twice: leave them out and list
    them in problems.jsonl beside the features, or stop."""
    min_image_size: int = 16
    """Images with a side of fewer pixels count as tiny."""
    resolution: int = 256
    """Images are brought to a square of this many pixels a side."""
    crop: Literal["center", "random", "pad", "stretch"] = "center"
    """How an image becomes a square: its middle; a part that its id chooses; all of it, between white bars or
    stretched."""
    resize: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """The filter that scales."""
    random_flip: bool = False
    """Encode the mirrored image as well; training then draws one of the two at each visit."""
    model_max_length: int = 77
    """Captions are padded or cut to this many tokens."""
    latent_scale: float | None = None
    """Factor from VAE latents to the model's. Default: the VAE's own; 0.2301 for a Stable Diffusion VAE."""
    batch_size: int = 32
    """Images (and captions) encoded at a time."""
    bf16: bool = False
    """Encode in bfloat16 (autocast): faster on a GPU, a little less exact."""
    fp16: bool = False
    """Encode in float16 (autocast): faster on a GPU, a little less exact; some VAEs overflow."""
    dtype: Literal["float16", "float32"] = "float16"
    """In which moments and contexts are stored."""
    shard_size: int = 1024
    """Pairs in each file of the store."""
    shard: str | None = None
    """I/N: do only part I, from 0, of N, beside other processes or machines that do theirs; torchrun sets it."""
    num_workers: int = 2
    """Processes that read and decode images; 0 does so in the main one."""
    device: str = "auto"
    """Where the encoders run: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        for flag in ("resolution", "model_max_length", "batch_size", "shard_size", "min_image_size"):
            _at_least(flag, getattr(self, flag), 1)
        _at_least("val_every", self.val_every, 2)
        check_split(self.split)
        if self.val_every is not None and self.split not in ("train", "val"):
            raise UserError(f"--split {self.split}: --val_every {self.val_every} makes the splits train and val")
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16: choose one")
        parse_shard(self.shard)
        _at_least("num_workers", self.num_workers, 0)
        if self.latent_scale is not None and not self.latent_scale > 0:
            raise UserError(f"--latent_scale {self.latent_scale}: must be above 0")
        if self.text != "tokens" and not self.text_encoder_name_or_path:
            raise UserError(f"--text {self.text}: needs --text_encoder_name_or_path; --text tokens does not")
        given = "tokenizer_name" if self.tokenizer_name else "text_encoder_name_or_path"
        if self.vocab_size is not None and (self.tokenizer_name or self.text_encoder_name_or_path):
            raise UserError(f"--vocab_size {self.vocab_size}: no tokenizer is built where --{given} has one")
