"""Command lines for walks over every flag of every command."""

from dataclasses import MISSING, fields
from typing import Any

from uvit.cli.main import COMMANDS, _load
from uvit.cli.parse import parse

SEVERAL = {"paths": ["a", "b"]}  # for flags that must be given; others take "x"
# What a flag needs beside it.
BESIDE = {
    ("autoencoder", "resolution"): ["--factor", "4"],
    ("sample", "mask"): ["--init_image", "x"],
    ("sample", "strength"): ["--init_image", "x"],
    ("serve", "num_inference_steps"): ["--max_steps", "1000"],
    ("serve", "max_steps"): ["--num_inference_steps", "1"],
    ("train", "image_logging_steps"): ["--logging_steps", "1"],
    ("train", "logging_steps"): ["--image_logging_steps", "-1"],
    ("train", "learning_rate"): ["--lr_scheduler_type", "constant"],
    ("train", "logit_mean"): ["--timestep_sampling", "logit_normal"],
    ("train", "logit_std"): ["--timestep_sampling", "logit_normal"],
    ("train", "uniform_share"): ["--timestep_sampling", "logit_normal"],
    ("train", "align_weight"): ["--align", "sra"],
    ("train", "align_block"): ["--align", "sra"],
    ("train", "align_until"): ["--align", "sra"],
    ("train", "min_lr"): ["--learning_rate", "1e308"],
    ("train", "ema_snapshot_steps"): ["--ema_lengths", "0.1"],
    ("train", "muon_learning_rate"): ["--optim", "muon"],
}


def arguments(command: str, name: str, given: list[str]) -> list[str]:
    """The arguments of a command in which `given` has the flag `name`, and all that must be there beside it."""
    words = ["--text", "tokens"] if command == "extract" else []
    if command == "extract" and name != "vae_name_or_path":
        words += ["--vae_name_or_path", "x"]
    for field in fields(_load(COMMANDS[command].config)):
        if field.default is MISSING and field.name != name:
            words += [f"--{field.name}", *SEVERAL.get(field.name, ["x"])]
    return [*given, *words, *BESIDE.get((command, name), [])]


def read(command: str, name: str, given: list[str]) -> Any:
    """The value of a flag, as the command reads it."""
    entry = COMMANDS[command]
    words = arguments(command, name, given)
    config, _ = parse(_load(entry.config), words, prog=f"uvit {command}", positional=entry.positional)
    return getattr(config, name)
