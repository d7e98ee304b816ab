"""Flags of `uvit train`. Those that decide what is learned are in `recipe.py` and `objective.py`."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from uvit.config.bounds import AnyInt, Bounds, PositiveInt, RealNumber
from uvit.config.evaluate import CLIP_SCORE_MODEL
from uvit.config.objective import ObjectiveConfig
from uvit.config.paths import PathFlag
from uvit.config.recipe import RecipeConfig
from uvit.config.sample import InferenceSteps
from uvit.errors import UserError

IGNORED_FLAGS = {
    "do_eval": "validation runs whenever there is a validation split",
    "only_save_updated_model": "a checkpoint holds what a resume needs, and the pipeline folder only the weights",
    "ignore_data_skip": "a resumed run need not skip data: a batch is computed from its step number",
    "to_static": "there is no static graph; --compile serves the same purpose",
    "dataloader_drop_last": "all batches are full: samples are counted across epochs",
    "num_records": "the feature store knows how many samples it holds",
    "buffer_size": "every epoch is a full permutation of the data; there is no shuffle buffer",
    "shuffle_every_n_samples": "every epoch is a full permutation of the data",
    "enable_xformers_memory_efficient_attention": "attention is always memory-efficient",
    "scale_loss": "with --fp16, the loss scale adapts itself",
    "amp_master_grad": "gradients are always added up in float32",
}
UNSUPPORTED = {
    "pipeline_parallel_degree": "the long skip connections would make pipeline stages wait for one another",
    "sep_parallel_degree": "a sequence of 334 tokens is too short to be worth splitting",
}

PARALLEL_DEGREES = ("dp_degree", "sharding_parallel_degree", "tensor_parallel_degree")

EvalMetric = Literal["fid", "kid", "prdc", "is", "clip_score", "fd", "attributes"]


@dataclass(frozen=True)
class TrainConfig(ObjectiveConfig, RecipeConfig):
    """Train a U-ViT on a feature store. Run the same command again to resume from the last checkpoint.

    uvit train --config emoji --feature_path output/features --output_dir output/run
    """

    # Precision and speed
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one. With several processes, each takes its own."""
    fp16: bool = False
    """Compute in float16, with loss scaling."""
    fp16_opt_level: Literal["O1", "O2"] = "O1"
    """O1: autocast over float32 weights; O2: low-precision weights with float32 master weights. Also holds for
    --bf16."""
    tf32: bool = True
    """On a GPU, compute float32 matrix products and convolutions in TF32, with 10 bits of mantissa: several times as
    fast. Without --bf16 and --fp16 these are all products."""
    recompute: bool = False
    """Activation checkpointing: recompute activations in the backward pass. Less memory, a third more compute."""
    compile: bool | None = None
    """Compile the blocks of the U-ViT with torch.compile. The first step then takes a minute, or more on a CPU.
    Default: on a GPU, for 1000 steps or more without --align."""
    cuda_graphs: bool = False
    """On one GPU, record forward and backward of a batch as a CUDA graph, and replay it: for batches so small that the
    GPU waits for the host. Takes more memory."""
    deterministic: bool = False
    """On a GPU, use only deterministic kernels; the slowdown has not been measured. A CPU is always deterministic."""
    hang_timeout: Annotated[float, Bounds(least=0, most=1_000_000_000)] = 600.0
    """If no step ends for this many seconds, each process prints where it is, and keeps waiting; 0: never."""

    # Validation
    validation_split: str = "val"
    """The split to validate on."""
    validation_feature_path: PathFlag | None = None
    """The features to validate on. Default: --validation_split of --feature_path, if it exists."""
    eval_steps: Annotated[int, Bounds(least=1, extra=-1, hint="-1 never validates")] = 5000
    """Steps between validations; the last step is always validated. -1: never. Every validation, of every run, uses
    the same pairs, noise and timesteps."""
    num_validation_samples: PositiveInt = 256
    """Number of pairs to validate on, at most."""

    # Evaluation
    eval_metrics: tuple[EvalMetric, ...] = ()
    """At each validation, also generate images with the EMA weights and measure them as `uvit evaluate` does: fid, kid,
    prdc, is, clip_score, fd (with a --feature_extractor), attributes (of the built-in shapes). Default: none."""
    eval_prompts: PositiveInt = 256
    """How many images to generate: for the first captions of the features to validate on, or else of those to train
    on; with `attributes`, for held-out shapes. Sampling takes --num_inference_steps steps at guidance 2."""
    eval_reference: PathFlag | None = None
    """The real images to compare with: anything that `uvit evaluate --reference` takes. Default: as many of the images
    that the features were made from."""
    feature_extractor: PathFlag | None = None
    """For fd, kid and prdc: any vision model of transformers, by folder or Hub id, or efficientnet_lite0, as in `uvit
    evaluate`. Results bear its name."""
    inception_weights: PathFlag | None = None
    """The file of FID's Inception. Default: pt_inception-2015-12-05-6726825d.pth in the cache of torch.hub."""
    clip_name_or_path: PathFlag = CLIP_SCORE_MODEL
    """CLIP for clip_score: a folder of transformers, or a Hub id."""
    keep_best: str | None = None
    """Keep the checkpoint with the best value of this metric too: val_loss, one of --eval_metrics, or one of their
    scores, such as `recall`. OUTPUT_DIR/best.json names it."""

    # Logging
    logging_steps: PositiveInt = 50
    """Steps between lines on the console and points of the trackers. logs/metrics.jsonl has every step."""
    logging_dir: PathFlag | None = None
    """The folder for logs. Default: OUTPUT_DIR/logs."""
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "tensorboard"
    """Trackers besides the console and metrics.jsonl: TensorBoard, Weights & Biases (install wandb), or all that are
    installed."""
    enable_tensorboard: bool = True
    """False: no TensorBoard, whatever --report_to says."""
    num_inference_steps: InferenceSteps = 50
    """Sampling steps of the preview images."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too: one every --logging_steps."""
    benchmark: bool = False
    """Report steady-state throughput and utilisation (MFU) at the end, without the first tenth of the steps."""
    profiler_options: str | None = None
    """Write a torch profiler trace of steps FIRST,LAST (such as 10,15) into the logs. Paddle's "batch_range=[10,15]" is
    the same."""

    # Checkpoints
    resume_from_checkpoint: PathFlag | None = None
    """Go back to this checkpoint folder, of this run or another; what came after it is set aside. Run again, the same
    command resumes from there. `latest`, and the default: the latest whole one in OUTPUT_DIR, if any."""
    save_total_limit: Annotated[int, Bounds(least=1, hint="leave it out to keep all")] | None = None
    """Keep only this many of the latest checkpoints. Default: all."""

    # Parallelism
    dp_degree: PositiveInt = 1
    """Data parallelism: replicas, each with its part of every batch. The product of --dp_degree,
    --sharding_parallel_degree and --tensor_parallel_degree is the number of processes."""
    sharding_parallel_degree: PositiveInt = 1
    """Fully sharded data parallelism (FSDP2): data-parallel processes that each keep 1/N of the weights, gradients,
    optimizer state and EMA weights."""
    tensor_parallel_degree: PositiveInt = 1
    """Tensor parallelism: processes that split the attention heads and MLPs of each block, on the same data."""
    pipeline_parallel_degree: PositiveInt = 1
    """Only 1: the long skip connections leave nothing to gain."""
    sep_parallel_degree: PositiveInt = 1
    """Only 1: the sequence is too short."""

    # Accepted for PaddleMIX command lines
    do_train: bool = True
    """False is accepted only with --dry_run."""
    do_eval: bool = False
    """Ignored."""
    only_save_updated_model: bool = False
    """Ignored."""
    ignore_data_skip: bool = False
    """Ignored."""
    to_static: bool = False
    """Ignored."""
    dataloader_drop_last: bool = False
    """Ignored."""
    num_records: AnyInt | None = None
    """Ignored."""
    buffer_size: AnyInt | None = None
    """Ignored."""
    shuffle_every_n_samples: AnyInt | None = None
    """Ignored."""
    enable_xformers_memory_efficient_attention: bool = False
    """Ignored."""
    scale_loss: RealNumber | None = None
    """Ignored."""
    amp_master_grad: bool = False
    """Ignored."""

    def __post_init__(self) -> None:
        RecipeConfig.__post_init__(self)
        ObjectiveConfig.__post_init__(self)
        if self.eval_steps == -1 and self.validation_feature_path:
            raise UserError(f"--validation_feature_path {self.validation_feature_path}: needs --eval_steps above 0")
        if self.eval_metrics and self.eval_steps == -1:
            raise UserError(f"--eval_metrics {' '.join(self.eval_metrics)}: needs --eval_steps above 0")
        if len(set(self.eval_metrics)) < len(self.eval_metrics):
            raise UserError(f"--eval_metrics {' '.join(self.eval_metrics)}: names a metric twice")
        if "fd" in self.eval_metrics and self.feature_extractor is None:
            raise UserError("--eval_metrics fd: needs a --feature_extractor")
        if self.keep_best not in (None, "val_loss") and not self.eval_metrics:
            raise UserError(f"--keep_best {self.keep_best}: needs --eval_metrics that measure it, or must be val_loss")
        if self.keep_best is not None and self.eval_steps == -1:
            raise UserError(f"--keep_best {self.keep_best}: needs --eval_steps above 0")
        if self.image_logging_steps > 0 and self.image_logging_steps % self.logging_steps:
            raise UserError(
                f"--image_logging_steps {self.image_logging_steps}: must be a multiple of --logging_steps "
                f"{self.logging_steps}"
            )
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16: choose one")
        if self.cuda_graphs:
            for name in ("gradient_accumulation_steps", *PARALLEL_DEGREES):
                if (value := getattr(self, name)) != 1:
                    raise UserError(f"--cuda_graphs: is for one process and one batch a step, and --{name} is {value}")
            if self.align != "none":
                raise UserError(f"--cuda_graphs and --align {self.align}: choose one")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise UserError(
                "--overwrite_output_dir starts from scratch and --resume_from_checkpoint resumes: choose one"
            )
        if not self.do_train and not self.dry_run:
            raise UserError("--do_train False: there is nothing to do; use --dry_run to look without training")
        for name, why in UNSUPPORTED.items():
            if getattr(self, name) != 1:
                raise UserError(f"--{name} {getattr(self, name)}: only 1 is possible, because {why}")
        self.profiled_steps()

    def profiled_steps(self) -> tuple[int, int] | None:
        """(first, last) step that the profiler records."""
        if self.profiler_options is None:
            return None
        steps = self._profiler_keys().get("batch_range", "")
        try:
            first, last = (int(part) for part in re.sub(r"^\[(.*)\]$", r"\1", steps).split(","))
        except ValueError:
            first, last = 0, -1
        if not 1 <= first <= last:
            raise UserError(f"--profiler_options {self.profiler_options}: must be two steps from 1 on, such as 10,15")
        if last >= self.max_steps and self.num_train_epochs is None:
            raise UserError(
                f"--profiler_options {self.profiler_options}: must end before the last step, which is --max_steps "
                f"{self.max_steps}"
            )
        return first, last

    def _profiler_keys(self) -> dict[str, str]:
        """Paddle's `batch_range=[10,15];profile_path=x` -> {key: value}; `10,15` is the batch_range."""
        given = self.profiler_options or ""
        parts = [part.partition("=") for part in given.split(";") if part.strip()]
        return {key.strip(): value.strip() for key, _, value in parts} if "=" in given else {"batch_range": given}

    def ignored_flags(self) -> list[str]:
        """One sentence for each flag that was set and has no effect here."""
        default = {field.name: field.default for field in fields(self)}
        why = dict(IGNORED_FLAGS)
        if not self.train_text_encoder:
            why["text_encoder_learning_rate"] = "only --train_text_encoder trains a text encoder"
        if not self.train_text_encoder or self.text_encoder_name_or_path:
            why["text_encoder_layers"] = (
                "only --train_text_encoder, without --text_encoder_name_or_path, makes a new one"
            )
        if self.ema_lengths or not self.use_ema:
            why["ema_decay"] = "there are no EMA weights with --use_ema False, and others with --ema_lengths"
        if not self.use_ema:
            why["ema_update_steps"] = "there are no EMA weights with --use_ema False"
        if self.pretrained_model_name_or_path is not None:
            why["uvit_config_file"] = "the model is that of --pretrained_model_name_or_path"
        if not self.eval_metrics:
            for name in (
                "eval_prompts",
                "eval_reference",
                "feature_extractor",
                "inception_weights",
                "clip_name_or_path",
            ):
                why[name] = "without --eval_metrics, no images are measured"
            if self.image_logging_steps <= 0:
                why["num_inference_steps"] = "there are neither previews nor --eval_metrics, so nothing is sampled"
        if self.lr_scheduler_type != "polynomial":
            why["lr_end"] = why["power"] = "only --lr_scheduler_type polynomial has it"
        if not self.lr_scheduler_type.startswith("cosine"):
            why["num_cycles"] = "only the schedules cosine and cosine_with_restarts have cycles"
        if self.warmup_steps:
            why["warmup_ratio"] = (
                f"the warm-up takes --warmup_steps {self.warmup_steps}; leave that out, or set it to 0"
            )
        ignored = {f"--{name}": reason for name, reason in why.items() if getattr(self, name) != default[name]}
        for key in self._profiler_keys():
            if key != "batch_range":
                ignored[f"--profiler_options {key}"] = "only batch_range counts; the trace goes into the logs"
        return [f"{name} is ignored: {reason}" for name, reason in ignored.items()]
