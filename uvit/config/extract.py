"""Flags of `uvit autoencoder`, `uvit tokenizer` and `uvit extract`: what comes before training."""

from dataclasses import dataclass
from typing import Annotated, Literal

from uvit.config.bounds import (
    BatchSize,
    Bounds,
    Fraction,
    ImageSide,
    NonNegativeFloat,
    NumTokens,
    NumWorkers,
    PositiveFloat,
    PositiveInt,
    Seed,
    VocabSize,
    check_bounds,
)
from uvit.config.paths import PathFlag, expand_paths
from uvit.config.sharding import parse_shard
from uvit.config.source import Crop, Icc, Resize, check_split, check_val_every
from uvit.errors import UserError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Train a VAE (a diffusers AutoencoderKL) on the images of a source.

    Stop it at any time. Run the same command again to resume.

    uvit autoencoder --source my_images --resolution 64 --factor 4 --output_dir output/vae
    """

    # Most used
    source: tuple[PathFlag, ...]
    """The images: any source of `uvit extract`, such as a folder with metadata.jsonl, a WebDataset .tar, a COCO folder
    or the built-in `shapes`."""
    output_dir: PathFlag
    """The folder to write. Diffusers' AutoencoderKL.from_pretrained opens it, and so does --vae_name_or_path."""
    resolution: Annotated[int, Bounds(least=4, most=65_536)] = 64
    """Side of the square images, in pixels."""
    factor: Literal[4, 8] = 8
    """Downsampling factor: image side / latent side."""
    max_steps: PositiveInt = 5000
    """Optimizer steps in total, from the start of the run."""
    batch_size: BatchSize = 32
    """Images per step."""
    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate of AdamW, with 100 warm-up steps and cosine decay to 0."""
    bf16: bool = False
    """Compute in bfloat16 over float32 weights. Faster on GPUs, and on CPUs with bfloat16 instructions."""

    # Data
    split: str = "train"
    """The split of the source."""
    val_every: Annotated[int, Bounds(least=2)] | None = None
    """Leave out every N-th pair of a source without splits, as `uvit extract --val_every N` does for train."""
    image_folder: tuple[PathFlag, ...] = ()
    """The images of COCO captions files or lists: one folder for all, or one for each."""
    image_column: str | None = None
    """The column with the images, or their paths, in a list or Hugging Face dataset. Default: the first usual name."""
    caption_column: str | None = None
    """The column with the captions, which a list must have. Default: the first usual name."""
    num_workers: NumWorkers = 0
    """Processes that decode images; 0: in the main process."""
    seed: Seed = 1234
    """Seed of the weights, the batches and the posterior samples."""

    # Model
    channels: Annotated[int, Bounds(least=8, most=4096)] = 32
    """Channels of the first level, a multiple of 8. Deeper levels have twice as many."""
    layers_per_block: Annotated[int, Bounds(least=1, most=100)] = 1
    """Residual layers per level."""
    latent_channels: Annotated[int, Bounds(least=1, most=1024)] = 4
    """Channels of the latents: in_channels of the U-ViT."""

    # Objective
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the KL divergence (mean over latents) against the squared error (mean over pixels)."""
    ema_decay: Fraction = 0.995
    """Decay of the EMA weights, which are the weights that are saved."""

    # Output and device
    save_steps: PositiveInt = 500
    """Steps between checkpoints, from which the same command resumes after a kill."""
    preview_steps: Annotated[int, Bounds(least=-1)] = 1000
    """Steps between images of reconstructions in OUTPUT_DIR/previews; -1: only at the end."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    overwrite_output_dir: bool = False
    """Start from scratch. The old contents of OUTPUT_DIR are kept under another name."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        check_val_every(self.split, self.val_every)
        if self.resolution % self.factor:
            raise UserError(f"--resolution {self.resolution}: must be a multiple of --factor {self.factor}")
        if self.channels % 8:
            raise UserError(f"--channels {self.channels}: must be a multiple of 8, for group normalization")


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a tokenizer on the captions of a source: byte-level BPE, lower-cased, for any language.

    uvit tokenizer --source my_images --output_dir output/tokenizer
    """

    source: tuple[PathFlag, ...]
    """The captions: any source of `uvit extract`."""
    output_dir: PathFlag
    """The folder to write. Transformers' AutoTokenizer opens it."""
    split: str = "train"
    """The split of the source."""
    val_every: Annotated[int, Bounds(least=2)] | None = None
    """Leave out every N-th pair of a source without splits, as `uvit extract --val_every N` does for train."""
    image_folder: tuple[PathFlag, ...] = ()
    """The images of COCO captions files or lists: one folder for all, or one for each."""
    image_column: str | None = None
    """The column with the images, or their paths, in a list or Hugging Face dataset. Default: the first usual name."""
    caption_column: str | None = None
    """The column with the captions: a string or a list of strings in each row. Default: the first usual name."""
    vocab_size: VocabSize = 8192
    """Maximum number of tokens. Captions with few words need fewer."""
    model_max_length: NumTokens = 77
    """Maximum number of tokens of a caption, start and end tokens included."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        check_val_every(self.split, self.val_every)


@dataclass(frozen=True)
class ExtractConfig:
    """Encode captioned images into a feature store, so that training needs neither VAE nor text encoder.

    Stop it at any time. Run the same command again to resume.

    uvit extract --source my_images --resolution 64 --vae_name_or_path output/vae --text tokens
        --output_dir output/features
    """

    # Most used
    source: tuple[PathFlag, ...]
    """The image-text pairs: one source, or several that are read one after another. A folder with metadata.jsonl;
    WebDataset .tar files, also as a{000..099}.tar or URLs; a COCO folder, or a COCO captions .json with --image_folder;
    a .csv, .tsv or .parquet list of image paths and captions; a Hugging Face dataset as a folder, .parquet files or
    hf:HUB_ID; or the built-in `shapes` and `shapes:two`."""
    output_dir: PathFlag
    """The feature store to write: new, or left by the same command. Each split is a folder in it."""
    vae_name_or_path: PathFlag | None = None
    """An AutoencoderKL: its folder, a pipeline folder, a Hub id, or the VAE preset `shapes`. Required without --latents
    none."""
    latents: Literal["vae", "none"] = "vae"
    """What to store of the images. vae: the moments of their latents; none: the pixels, for a model without a VAE."""
    text_encoder_name_or_path: PathFlag | None = None
    """A CLIP, T5 or BERT-like text encoder: its folder, a pipeline folder or a Hub id."""
    text: Literal["contexts", "tokens", "both"] = "contexts"
    """What to store of the captions. contexts: the text embeddings, that is, the text encoder's last hidden states;
    tokens: token ids, for training with a text encoder; both."""
    resolution: ImageSide = 256
    """Side of the square images, in pixels."""
    model_max_length: NumTokens = 77
    """Number of tokens that captions are padded or truncated to."""
    split: str = "train"
    """The split of the source, and its name in the feature store. `shapes` has `train` and `heldout`; folders have the
    splits that they are named after."""
    batch_size: BatchSize = 32
    """Images (and captions) that are encoded at a time."""

    # Source
    val_every: Annotated[int, Bounds(least=2)] | None = None
    """For a source without splits: put every N-th pair into the split val, and the others into train."""
    image_folder: tuple[PathFlag, ...] = ()
    """The images of COCO captions files or lists: one folder for all, or one for each."""
    image_column: str | None = None
    """The column with the images, or their paths, in a list or Hugging Face dataset. Default: the first usual name."""
    caption_column: str | None = None
    """The column with the captions: a string or a list of strings in each row. Default: the first usual name."""
    streaming: bool = False
    """Stream a Hugging Face dataset instead of downloading it first."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do about broken, tiny or missing images, empty captions and duplicate ids: skip them and list them in
    problems.jsonl beside the features, or stop."""
    min_image_size: PositiveInt = 16
    """Images with a side shorter than this many pixels count as tiny."""

    # Images
    crop: Crop = "center"
    """How an image becomes a square: its center; a crop that depends on its id alone; all of it, with white borders or
    stretched."""
    resize: Resize = "lanczos"
    """The resampling filter."""
    icc: Icc = "srgb"
    """What to do with the colour profiles of images. srgb: convert the colours to sRGB; ignore: take the numbers as
    they are, as for the published models."""
    random_flip: bool = False
    """Also encode the mirrored image. Training then picks one of the two at random each time. With --latents none,
    training mirrors the images itself, and nothing more is stored."""

    teacher: PathFlag | None = None
    """A vision model of transformers, by folder or Hub id, such as a DINOv2: also store the features that it finds in
    the images, in float16, for `uvit train --align`. They take much space."""

    # Text
    tokenizer_name: PathFlag | None = None
    """A tokenizer's folder or Hub id. Default: the text encoder's tokenizer; without one, a tokenizer is trained on the
    captions."""
    vocab_size: VocabSize | None = None
    """Vocabulary size of the tokenizer that is trained on the captions. Default: 8192."""

    # Store
    latent_scale: PositiveFloat | None = None
    """Factor from VAE latents to model latents. Default: the VAE's own, or 0.2301 for a Stable Diffusion VAE."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type in which moments and text embeddings are stored."""
    shard_size: PositiveInt = 1024
    """Pairs per file of the store."""

    # Precision and speed
    bf16: bool = False
    """Encode in bfloat16 (autocast): faster on a GPU, slightly less exact."""
    fp16: bool = False
    """Encode in float16 (autocast): faster on a GPU, slightly less exact. Some VAEs overflow."""
    num_workers: NumWorkers = 2
    """Processes that read and decode images; 0: in the main process."""
    shard: str | None = None
    """I/N: do only part I (from 0) of N, while other processes or machines do the others. torchrun sets this itself."""
    device: str = "auto"
    """Where the encoders run: cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        check_split(self.split)
        check_val_every(self.split, self.val_every)
        parse_shard(self.shard)
        if self.latents == "vae" and self.vae_name_or_path is None:
            raise UserError("--vae_name_or_path: is required, unless --latents none stores pixels")
        for flag in ("vae_name_or_path", "latent_scale"):
            if self.latents == "none" and (given := getattr(self, flag)) is not None:
                raise UserError(f"--{flag} {given}: --latents none stores pixels, without a VAE; leave one of them out")
        if self.teacher is not None and self.random_flip:
            raise UserError(
                f"--teacher {self.teacher} and --random_flip: features of mirrored images are not stored; choose one"
            )
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16: choose one")
        if self.text != "tokens" and not self.text_encoder_name_or_path:
            raise UserError(f"--text {self.text}: needs --text_encoder_name_or_path; --text tokens does not")
        encoder = "tokenizer_name" if self.tokenizer_name else "text_encoder_name_or_path"
        if self.vocab_size is not None and (self.tokenizer_name or self.text_encoder_name_or_path):
            raise UserError(f"--vocab_size {self.vocab_size}: no tokenizer is trained, because --{encoder} has one")
