"""What PaddleMIX and the official U-ViT code call the things that flags are for here: hints for error messages."""

import re
from collections.abc import Sequence

OTHER_FLAGS = {
    # Paddle's trainer
    "data_parallel_degree": "use --dp_degree",
    "sharding": "use --sharding_parallel_degree N, which shards weights, gradients and optimizer state",
    "gradient_checkpointing": "use --recompute",
    "load_best_model_at_end": "use --keep_best METRIC",
    # Launchers
    "local_rank": "start the processes with torchrun, which passes no such flag",
    "mixed_precision": "use --fp16 or --bf16",
    # Flags of the official scripts
    "workdir": "use --output_dir",
    "nnet_path": "convert the file with `uvit convert`, and give the folder to --pipeline",
    "input_path": "use --prompts_file",
    # Keys of the official configs, with or without `config.`
    "train.n_steps": "use --max_steps",
    "train.batch_size": "use --per_device_train_batch_size, which is of each process",
    "train.log_interval": "use --logging_steps",
    "train.save_interval": "use --save_steps",
    "train.eval_interval": "use --image_logging_steps for images, and --eval_steps for the validation loss",
    "optimizer.lr": "use --learning_rate",
    "optimizer.weight_decay": "use --weight_decay",
    "optimizer.betas": "use --adam_beta1 and --adam_beta2",
    "lr_scheduler.warmup_steps": "use --warmup_steps",
    "nnet.use_checkpoint": "use --recompute",
    "nnet": "the model is in the JSON file or the preset that --uvit_config_file names",
    "z_shape": "the model is in the JSON file or the preset that --uvit_config_file names",
    "dataset.path": "use --feature_path",
    "autoencoder.pretrained_path": "use --vae_name_or_path",
    "autoencoder.scale_factor": "use --latent_scale",
    "ema_rate": "use --ema_decay",
    "sample.sample_steps": "use --num_inference_steps",
    "sample.n_samples": "use --max_prompts of `uvit evaluate`",
    "sample.scale": "use --guidance_scale, which is 1 more, with `uvit sample` or `uvit evaluate`",
    "sample.mini_batch_size": "use --batch_size of `uvit sample` or `uvit evaluate`",
    "sample.path": "use --output_dir of `uvit sample`",
    "sample": "the flags of `uvit sample` and `uvit evaluate` are for that",
}
OTHER_VALUES = {
    ("report_to", "visualdl"): "use tensorboard, or leave --report_to out",
    ("device", "gpu"): "use cuda, or leave --device out",
    ("max_steps", "-1"): "leave --max_steps out",
}
PAGE_OF_KEYS = "docs/migrating.md lists the flag for each key"


def flag_hint(name: str) -> str | None:
    """What to use instead of a flag that does not exist. None: it is nobody's."""
    key = re.sub(r"^config\.", "", name)
    for known in (key, key.partition(".")[0] if "." in key else key):
        if known in OTHER_FLAGS:
            return OTHER_FLAGS[known]
    return f"{PAGE_OF_KEYS} of the official configs" if key != name else None


def value_hint(name: str, items: Sequence[str]) -> str | None:
    """What to give to a flag instead of these values. None: they are not known to be another program's."""
    return OTHER_VALUES.get((name, " ".join(items).lower()))


def config_hint(given: str) -> str | None:
    """What is wrong with the value of --config. None: it is not the official code's."""
    return f"is a Python config of the official code; {PAGE_OF_KEYS}" if given.endswith(".py") else None
