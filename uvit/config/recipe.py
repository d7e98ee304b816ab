"""Flags of `uvit train` that decide what is learned: data, model, objective, batches, optimizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from uvit.config.bounds import (
    BatchSize,
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    NumWorkers,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_bounds,
)
from uvit.config.ema import EmaLength
from uvit.config.paths import PathFlag, expand_paths
from uvit.errors import UserError

DEFAULT_WARMUP_STEPS = 5000


@dataclass(frozen=True)
class RecipeConfig:
    """The first flags of `uvit train`, in the order of its help."""

    # Most used
    feature_path: PathFlag
    """A feature store written by `uvit extract`, or a folder of .npy features in the U-ViT layout (train/0.npy,
    train/0_0.npy, ...)."""
    output_dir: PathFlag
    """The run's folder: checkpoints, config.yaml, logs/, previews/ and, at the end, pipeline/."""
    uvit_config_file: PathFlag = "uvit_t2i_small"
    """The model: a model preset, such as uvit_t2i_small, uvit_t2i_large or emoji, or a JSON file."""
    train_text_encoder: bool = False
    """Train the text encoder together with the U-ViT, on the store's token ids."""
    per_device_train_batch_size: BatchSize = 32
    """Samples of one forward pass in each process."""
    max_steps: PositiveInt = 1_000_000
    """Optimizer steps in total, from the start of the run, whatever batch they had before a resume."""
    learning_rate: NonNegativeFloat = 2e-4
    """Peak learning rate."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps over which the learning rate rises from 0. Default: 5000, or --warmup_ratio of all steps."""
    bf16: bool | None = None
    """Compute in bfloat16. Default: on a GPU that has it, unless --fp16."""
    save_steps: PositiveInt = 5000
    """Steps between checkpoints. The last step is always saved."""
    image_logging_steps: Annotated[int, Bounds(least=-1, hint="-1 turns previews off")] = 1000
    """Steps between preview images, a multiple of --logging_steps; -1: no previews."""
    overwrite_output_dir: bool = False
    """Start from scratch. The old contents of OUTPUT_DIR are kept under another name."""
    dry_run: bool = False
    """Print the model, its FLOPs, the memory it needs and the steps of an epoch; train nothing."""

    # Data
    model_max_length: PositiveInt | None = None
    """Tokens of a caption. Must match the store and the model (77 in the presets); only checked."""
    resolution: PositiveInt | None = None
    """Side of the images in pixels. Must match the store; only checked."""
    latent_scale: PositiveFloat | None = None
    """Factor from VAE latents to model latents. Default: the store's; for .npy features that of --vae_name_or_path, or
    0.23010."""
    dataloader_num_workers: NumWorkers = 8
    """Threads that read and prepare batches, at most one per core; 0: in the training loop itself."""
    features_in_memory: Literal["auto", "device", "host", "none"] = "auto"
    """Keep all features of a store in memory: of the GPU (device), or of the host. The batches are the same. auto: in a
    GPU's, if there is room for them beside the training; none: read each batch from disk."""

    # Model
    pretrained_model_name_or_path: PathFlag | None = None
    """Start from the weights of a pipeline folder. The VAE, text encoder and tokenizer in it are used too, and override
    the flags that name them."""
    vae_name_or_path: PathFlag | None = None
    """The VAE that made the features, for previews and the final pipeline. Default: the one the store names."""
    weight_init_std: PositiveFloat = 0.02
    """Standard deviation of the U-ViT's initial linear weights. Narrow models in short runs learn faster with 0.06."""
    position_init_std: PositiveFloat = 0.02
    """Standard deviation of its initial position embeddings. Narrow models in short runs learn faster with 0.5."""
    use_ema: bool = True
    """Keep an exponential moving average (EMA) of the weights, for validation, previews and the pipeline."""
    ema_decay: Fraction | None = None
    """Decay of the EMA weights per optimizer step. Default: averages over 5% of the run's steps, but at most 10,000
    (0.9999)."""
    ema_lengths: tuple[EmaLength, ...] = ()
    """Instead of --ema_decay, average the steps so far with a weight that is a power of the step: these are the lengths
    of the averages, as fractions of the run, such as 0.05 0.1 (EDM2). The first is that of the EMA weights. Snapshots
    of all in OUTPUT_DIR/ema let `uvit ema` make any other length later."""
    ema_snapshot_steps: PositiveInt | None = None
    """Steps between snapshots of the averages of --ema_lengths. Default: --save_steps."""
    ema_update_steps: PositiveInt = 1
    """Steps between updates of the EMA weights, each with the decay of so many steps: 10 makes them almost free."""

    # Text encoder
    text_encoder_name_or_path: PathFlag | None = None
    """The text encoder that made the text embeddings, or that encodes the store's token ids during training. Also goes
    into the final pipeline. Default: the one the store names."""
    tokenizer_name: PathFlag | None = None
    """The text encoder's tokenizer. Default: the one the store names."""
    text_encoder_layers: Annotated[int, Bounds(least=1, most=1000)] = 2
    """Layers of a text encoder trained from scratch (--train_text_encoder without --text_encoder_name_or_path)."""
    text_encoder_learning_rate: NonNegativeFloat | None = None
    """Learning rate of the text encoder. Default: --learning_rate. That of Muon changes in proportion."""
    unet_learning_rate: NonNegativeFloat | None = None
    """Learning rate of the U-ViT. Default: --learning_rate. That of Muon changes in proportion."""

    # Batches
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step. Their losses are averaged."""
    num_train_epochs: Annotated[float, Bounds(above=0, most=1_000_000_000)] | None = None
    """Train for this many passes over the data instead of --max_steps. They are counted in samples, so a resumed run
    may have another batch, another number of processes or more data."""
    seed: Seed = 1234
    """Seed of the initial weights, the data order and all random numbers of training."""

    # Optimizer
    optim: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW with decoupled weight decay on all parameters. muon: Muon for the matrices of transformer blocks,
    and AdamW for the rest. A step takes longer, above all in small batches, and teaches more."""
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of Muon. Default: 0.002."""
    weight_decay: NonNegativeFloat = 0.03
    """Weight decay of the optimizer."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's average of gradients."""
    adam_beta2: Fraction = 0.9
    """Decay of AdamW's average of squared gradients."""
    adam_epsilon: NonNegativeFloat = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: Annotated[float, Bounds()] = -1.0
    """Clip the gradient norm to this value; 0 or less: no clipping."""
    lr_scheduler_type: Literal[
        "constant_with_warmup", "constant", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    """Learning rate schedule after the warm-up (`constant` has no warm-up)."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a fraction of all steps. Not used if --warmup_steps is given, and above 0."""
    num_cycles: Annotated[float, Bounds(above=0, most=1_000_000_000)] | None = None
    """Number of waves of `cosine` (default: 0.5) or of restarts of `cosine_with_restarts` (default: 1)."""
    lr_end: NonNegativeFloat = 1e-7
    """Final learning rate of the `polynomial` schedule."""
    power: NonNegativeFloat = 1.0
    """Exponent of the `polynomial` schedule."""
    min_lr: NonNegativeFloat = 0.0
    """Lower bound of the learning rate after the warm-up."""
    max_nonfinite_steps: PositiveInt = 20
    """Roll back to the last good checkpoint after this many consecutive skipped steps (NaN/Inf loss or gradient, or
    gradient norm above --spike_factor), and skip their samples from then on."""
    spike_factor: Annotated[float, Bounds(above=1, extra=0, hint="0 skips no spikes")] = 20.0
    """Skip steps whose gradient norm is more than this many times the median of the last 100; 0: never."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", 0 if self.warmup_ratio else DEFAULT_WARMUP_STEPS)
        if self.pretrained_model_name_or_path and (self.weight_init_std, self.position_init_std) != (0.02, 0.02):
            raise UserError(
                "--weight_init_std and --position_init_std are for initial weights: leave them out with "
                f"--pretrained_model_name_or_path {self.pretrained_model_name_or_path}"
            )
        given = " ".join(f"{length:g}" for length in self.ema_lengths)
        if len(set(given.split())) < len(self.ema_lengths):
            raise UserError(f"--ema_lengths {given}: names a length twice")
        if self.ema_lengths and not self.use_ema:
            raise UserError(f"--ema_lengths {given}: needs EMA weights; leave --use_ema False out")
        if self.ema_snapshot_steps is not None and not self.ema_lengths:
            raise UserError(f"--ema_snapshot_steps {self.ema_snapshot_steps}: needs --ema_lengths")
        for name in ("ema_snapshot_steps", "save_steps") if self.ema_lengths else ():
            if (steps := getattr(self, name)) is not None and steps % self.ema_update_steps:
                raise UserError(
                    f"--{name} {steps}: must be a multiple of --ema_update_steps {self.ema_update_steps} with "
                    "--ema_lengths"
                )
        if self.optim == "adamw" and self.muon_learning_rate is not None:
            raise UserError(f"--muon_learning_rate {self.muon_learning_rate}: needs --optim muon")
        if self.optim == "muon" and not self.learning_rate:
            raise UserError("--learning_rate 0: must be above 0 with --optim muon, whose rate changes in proportion")
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr {self.min_lr}: must not be above --learning_rate {self.learning_rate}")
        if self.lr_scheduler_type == "polynomial" and self.lr_end > self.learning_rate > 0:
            raise UserError(f"--lr_end {self.lr_end}: must not be above --learning_rate {self.learning_rate}")

    @property
    def peak_muon_learning_rate(self) -> float:
        return 0.002 if self.muon_learning_rate is None else self.muon_learning_rate
