"""`uvit train`: every flag, its help, its checks."""

from dataclasses import dataclass, fields
from typing import Literal

from uvit.errors import UserError

IGNORED_FLAGS = {
    "do_eval": "validation runs whenever there is a validation split",
    "only_save_updated_model": "a checkpoint holds what a resume needs, and the pipeline folder only the weights",
    "ignore_data_skip": "resuming skips no data: a batch is computed from the step's number",
    "to_static": "there is no static graph; --compile does what it was for",
    "dataloader_drop_last": "no batch is ever short: samples are counted across epochs",
    "num_records": "the feature store knows how many samples it holds",
    "buffer_size": "every epoch is a full permutation of the data; there is no shuffle buffer",
    "shuffle_every_n_samples": "every epoch is a full permutation of the data",
    "enable_xformers_memory_efficient_attention": "attention is memory-efficient anyway",
}
UNSUPPORTED = {
    "pipeline_parallel_degree": "the long skips tie first blocks to last ones, so stages would wait for one another",
    "sep_parallel_degree": "a sequence of 334 tokens is too short to be worth splitting",
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a U-ViT. The same command run again resumes from the last checkpoint."""

    feature_path: str
    """A feature store that `uvit extract` wrote, or a folder in the old layout (train/0.npy, train/0_0.npy, ...)."""
    output_dir: str
    """The run's folder: checkpoints, config.yaml, logs/, previews/ and at the end pipeline/."""
    overwrite_output_dir: bool = False
    """Start afresh; what OUTPUT_DIR holds is kept under another name."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or `latest`. Without it: the latest whole one in OUTPUT_DIR, if there is one."""

    # The network
    uvit_config_file: str = "uvit_t2i_small"
    """Name of a shipped model config, or a JSON file."""
    weight_init_std: float = 0.02
    """Standard deviation of the U-ViT's fresh linear weights; narrow models in short runs learn faster from 0.06."""
    position_init_std: float = 0.02
    """The same of its position embeddings; narrow models in short runs learn faster from 0.5."""
    pretrained_model_name_or_path: str | None = None
    """Start from the weights of a pipeline folder; its encoders are used as well. Comes before the next three."""
    vae_name_or_path: str | None = None
    """The VAE that made the features, for previews and the final pipeline; the store usually knows it."""
    text_encoder_name_or_path: str | None = None
    """The text encoder that made the contexts or encodes token ids as they come, also for the final pipeline; the
    store usually knows it."""
    tokenizer_name: str | None = None
    """The text encoder's tokenizer; the store usually knows it."""
    model_max_length: int | None = None
    """Tokens of a caption; must be the store's and the model's (77 in the shipped configs)."""
    resolution: int | None = None
    """Side of the images in pixels; only checked against the store's."""

    # The objective
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts."""
    snr_gamma: float | None = None
    """Weigh the loss by min-SNR with this gamma (5 is usual)."""
    noise_offset: float = 0.0
    """Add this much noise that is constant over each channel, for pictures darker or lighter than the mean."""
    latent_scale: float | None = None
    """Factor from the VAE's latents to the model's; without it the store's, or 0.23010 for the old layout."""

    # The text encoder
    train_text_encoder: bool = False
    """Train the text encoder jointly, from the store's token ids."""
    text_encoder_layers: int = 2
    """Layers of the text encoder that is trained from scratch where no --text_encoder_name_or_path is given."""
    text_encoder_learning_rate: float | None = None
    """Learning rate of the text encoder; without it --learning_rate."""
    unet_learning_rate: float | None = None
    """Learning rate of the U-ViT; without it --learning_rate."""

    # Batches
    per_device_train_batch_size: int = 32
    """Samples of one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one update; their loss is averaged."""
    dataloader_num_workers: int = 8
    """Threads that read and draw batches, at most one a core; 0: the training loop itself."""
    seed: int = 1234
    """Seed of the weights and of everything that is drawn."""

    # The optimizer
    optim: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay on all parameters."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    weight_decay: float = 0.03
    """AdamW's weight decay."""
    adam_beta1: float = 0.9
    """Decay of the gradient's average."""
    adam_beta2: float = 0.9
    """Decay of the squared gradient's average."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: float = -1.0
    """Clip the gradient's norm to this; 0 or less: measured, not clipped."""
    max_steps: int = 1_000_000
    """Optimizer steps."""
    num_train_epochs: float | None = None
    """Train for so many passes over the data, instead of --max_steps."""
    lr_scheduler_type: Literal[
        "constant_with_warmup", "constant", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    """How the learning rate goes on after the warm-up (`constant` has none)."""
    warmup_steps: int = 5000
    """Optimizer steps over which the learning rate rises from 0."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps; counts where --warmup_steps is 0."""
    num_cycles: float | None = None
    """Cosine: waves until the end (0.5); cosine_with_restarts: how many (1)."""
    lr_end: float = 1e-7
    """Polynomial: the learning rate at the end."""
    power: float = 1.0
    """Polynomial: its power."""
    min_lr: float = 0.0
    """The learning rate never falls below this after the warm-up."""
    use_ema: bool = True
    """Keep averaged weights; previews and the pipeline use them."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, an optimizer step."""
    max_nonfinite_steps: int = 20
    """Updates with a loss or gradient that is not finite, or that --spike_factor forbids, are skipped; so many in a
    row, and the run goes back to its last checkpoint and passes their samples over."""
    spike_factor: float = 20.0
    """Skip updates whose gradient norm is above this many times the median of the last 100; 0: none of them."""

    # Speed and memory
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    bf16: bool = False
    """Compute in bfloat16."""
    fp16: bool = False
    """Compute in float16, with loss scaling."""
    fp16_opt_level: Literal["O1", "O2"] = "O1"
    """O1: autocast over float32 weights; O2: low-precision weights with float32 masters. Holds for --bf16 too."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    compile: bool = False
    """torch.compile the U-ViT; the first step takes minutes."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits each time; how much slower that is was not measured. On a CPU
    it is so anyway."""
    hang_timeout: float = 1800.0
    """After so many seconds in which no step ended, each process prints where it is, and goes on waiting; 0: never."""

    # Validation
    validation_feature_path: str | None = None
    """Features to validate on; without it those of --validation_split in --feature_path, where there are any."""
    validation_split: str = "val"
    """The split to validate on."""
    eval_steps: int = 5000
    """Steps between validations, and one at the end; -1: never. Each is the loss on the same pairs, noise and
    timesteps, in every run."""
    num_validation_samples: int = 256
    """Pairs that a validation looks at, where there are so many."""

    # What a person sees
    logging_steps: int = 50
    """Steps between lines on the console and points on the boards; logs/metrics.jsonl has every step."""
    logging_dir: str | None = None
    """Where the logs go; without it OUTPUT_DIR/logs."""
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "tensorboard"
    """Besides the console and metrics.jsonl: TensorBoard, Weights & Biases (which has to be installed), or all that
    are there."""
    enable_tensorboard: bool = True
    """False: no TensorBoard, whatever --report_to says."""
    image_logging_steps: int = 1000
    """Steps between previews, a multiple of --logging_steps; -1: none."""
    num_inference_steps: int = 50
    """Sampling steps of the previews."""
    disable_tqdm: bool = False
    """No progress bar; lines every --logging_steps instead."""
    benchmark: bool = False
    """Report steady-state throughput and utilisation (MFU) at the end, its first tenth of steps left out."""
    profiler_options: str | None = None
    """Write a torch profiler trace of the steps FIRST,LAST (such as 10,15) into the logs."""
    dry_run: bool = False
    """Show the model, its FLOPs, the memory it needs and the steps of an epoch; train nothing."""

    # Checkpoints
    save_steps: int = 5000
    """Steps between checkpoints; one is written at the end as well."""
    save_total_limit: int | None = None
    """Keep only so many checkpoints, the latest ones."""

    # More than one process
    dp_degree: int = 1
    """Replicas, each with its share of the data. The product of the three degrees is the number of processes."""
    sharding_parallel_degree: int = 1
    """Processes that share the data, and keep 1/N of weights, gradients, optimizer and EMA each (FSDP2)."""
    tensor_parallel_degree: int = 1
    """Processes that split the attention heads and MLPs of each block, on the same data."""
    pipeline_parallel_degree: int = 1
    """Only 1: the long skips leave nothing to gain."""
    sep_parallel_degree: int = 1
    """Only 1: the sequence is short."""

    # Accepted from older command lines
    do_train: bool = True
    """False with nothing else to do is an error; use --dry_run to look without training."""
    do_eval: bool = False
    """Not needed here."""
    only_save_updated_model: bool = False
    """Not needed here."""
    ignore_data_skip: bool = False
    """Not needed here."""
    to_static: bool = False
    """Not needed here."""
    dataloader_drop_last: bool = False
    """Not needed here."""
    num_records: int | None = None
    """Not needed here."""
    buffer_size: int | None = None
    """Not needed here."""
    shuffle_every_n_samples: int | None = None
    """Not needed here."""
    enable_xformers_memory_efficient_attention: bool = False
    """Not needed here."""

    def __post_init__(self) -> None:
        at_least_one = (
            "per_device_train_batch_size gradient_accumulation_steps max_steps logging_steps save_steps "
            "num_inference_steps max_nonfinite_steps text_encoder_layers num_validation_samples "
            "dp_degree sharding_parallel_degree tensor_parallel_degree"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        not_negative = (
            "learning_rate weight_decay adam_epsilon noise_offset warmup_steps min_lr dataloader_num_workers "
            "hang_timeout"
        )
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        for name in ("adam_beta1", "adam_beta2", "ema_decay", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        for name in (
            "snr_gamma",
            "num_train_epochs",
            "latent_scale",
            "num_cycles",
            "weight_init_std",
            "position_init_std",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} {value}: must be above 0")
        if self.spike_factor != 0 and not self.spike_factor > 1:
            raise UserError(f"--spike_factor {self.spike_factor}: must be above 1; 0 skips no spikes")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(f"--save_total_limit {self.save_total_limit}: must be at least 1; leave it out to keep all")
        if self.eval_steps < 1 and self.eval_steps != -1:
            raise UserError(f"--eval_steps {self.eval_steps}: must be at least 1; -1 never validates")
        if self.eval_steps == -1 and self.validation_feature_path:
            raise UserError(
                f"--validation_feature_path {self.validation_feature_path}: --eval_steps -1 never looks at it; "
                "choose one"
            )
        if self.image_logging_steps > 0 and self.image_logging_steps % self.logging_steps:
            raise UserError(
                f"--image_logging_steps {self.image_logging_steps}: must be a multiple of --logging_steps "
                f"{self.logging_steps}"
            )
        if self.pretrained_model_name_or_path and (self.weight_init_std, self.position_init_std) != (0.02, 0.02):
            raise UserError(
                "--weight_init_std and --position_init_std are for fresh weights: leave them out with "
                f"--pretrained_model_name_or_path {self.pretrained_model_name_or_path}"
            )
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16: choose one")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise UserError("--overwrite_output_dir starts afresh and --resume_from_checkpoint goes on: choose one")
        if not self.do_train and not self.dry_run:
            raise UserError("--do_train False: there is nothing to do; --dry_run looks without training")
        self.profiled_steps()
        self._check_degrees()

    def _check_degrees(self) -> None:
        for name, why in UNSUPPORTED.items():
            if getattr(self, name) != 1:
                raise UserError(f"--{name} {getattr(self, name)}: only 1 is possible, because {why}")

    def profiled_steps(self) -> tuple[int, int] | None:
        """(first, last) step that the profiler records."""
        if self.profiler_options is None:
            return None
        try:
            first, last = (int(part) for part in self.profiler_options.split(","))
            if 0 <= first <= last:
                return first, last
        except ValueError:
            pass
        raise UserError(f"--profiler_options {self.profiler_options}: must be two steps, such as 10,15")

    def ignored_flags(self) -> list[str]:
        """One sentence for each flag that was set and is not needed here."""
        default = {field.name: field.default for field in fields(self)}
        return [
            f"--{name}: not needed here ({why})"
            for name, why in IGNORED_FLAGS.items()
            if getattr(self, name) != default[name]
        ]
