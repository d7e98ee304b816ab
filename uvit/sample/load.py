"""Finds the pipeline folder that `--pipeline` names, and opens it on its device."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from uvit.checkpoint.folder import RECORD, checkpoint_folders, newer_checkpoint, step_of
from uvit.device import pick_device, slow_precision
from uvit.errors import UserError
from uvit.progress import write
from uvit.sample.fit import read_plans
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import DEFAULT_SCHEDULER, MultistepScheduler, build_scheduler, steps_shift
from uvit.weights.detect import INDEX, is_third_party
from uvit.weights.encoders import quiet
from uvit.weights.pipeline_networks import check_unet_weights, load_pipeline_encoders


def find_pipeline(path: str, flag: str = "pipeline") -> Path:
    """The pipeline folder: `path` itself, or `path/pipeline` of a finished training run.

    Raises UserError with what to do if there is none.
    """

    def command(source: str | Path, dest: str | Path = "pipeline") -> str:
        return shlex.join(["uvit", "convert", str(source), str(dest)])

    def with_encoders(source: str | Path) -> str:
        return f"{command(source)} --vae_name_or_path VAE --text_encoder_name_or_path CLIP --tokenizer_name CLIP"

    folder = Path(path)
    for candidate in (folder, folder / "pipeline"):
        if (candidate / INDEX).is_file():
            return candidate
    where = f"--{flag} {path}:"
    if folder.is_file():
        raise UserError(
            f"{where} is a file; to make a pipeline of these weights and their encoders, run: {with_encoders(path)}"
        )
    if not folder.is_dir():
        hub = "; a model of the Hub has to be downloaded first" * bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path))
        raise UserError(f"{where} there is no such folder; give OUTPUT_DIR/pipeline of a finished training run{hub}")
    if (folder / RECORD).is_file():
        target = folder.with_name(f"pipeline-{folder.name.removeprefix('checkpoint-')}")
        raise UserError(f"{where} is a training checkpoint; to make a pipeline from it, run: {command(folder, target)}")
    if found := checkpoint_folders(folder):
        raise UserError(
            f"{where} is a training run without a pipeline; to make one of a checkpoint, run: "
            + command(found[-1], folder / "pipeline")
        )
    raise UserError(
        f"{where} has no {INDEX}, so it is not a pipeline folder; give OUTPUT_DIR/pipeline of a finished training "
        f"run, or make a pipeline of weights and their encoders: {with_encoders(path)}"
    )


def open_pipeline(
    path: str,
    device: str,
    dtype: str = "float32",
    scheduler: str = DEFAULT_SCHEDULER,
    model_cpu_offload: bool = False,
) -> UViTPipeline:
    """Open a pipeline on its device, with the named scheduler. Raises UserError if it cannot be opened."""
    folder, chosen = find_pipeline(path), pick_device(device)
    if model_cpu_offload and chosen.type == "cpu":
        raise UserError(
            f"--enable_model_cpu_offload: saves GPU memory, and --device {device} is the CPU here; leave it out"
        )
    if (newer := newer_checkpoint(folder)) is not None:
        made = shlex.join(["uvit", "convert", str(newer), f"{folder}-{step_of(newer)}"])
        write(f"warning: {folder} is older than {newer.name} of its run; for that one: {made}", file=sys.stderr)
    for sentence in slow_precision(f"--dtype {dtype}", chosen, getattr(torch, dtype)):
        write(f"warning: {sentence}", file=sys.stderr)
    with quiet():
        try:
            is_ours = not is_third_party(folder)
            encoders = load_pipeline_encoders(folder, getattr(torch, dtype)) if is_ours else {}
            pipeline = UViTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **encoders)
            if is_ours:
                check_unet_weights(pipeline.unet, folder)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a wrong value in a config raises errors of any type
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"--pipeline {folder}: is incomplete, or its components do not fit together ({reason})"
            ) from None
    if model_cpu_offload:
        pipeline.enable_model_cpu_offload(device=chosen)
    else:
        pipeline.to(chosen)
    pipeline.scheduler = named_scheduler(pipeline, folder, scheduler)
    pipeline.set_progress_bar_config(disable=True)  # commands show their own progress
    return pipeline


def named_scheduler(pipeline: UViTPipeline, folder: Path, name: str) -> Any:
    """The scheduler of a name for a pipeline and its folder, with the shift of the pipeline's own steps.

    Raises UserError if it cannot sample the path of the pipeline's U-ViT, or its fitted solvers cannot be read.
    """
    path = pipeline.conventions.path
    if name == "fitted":
        return MultistepScheduler(read_plans(folder), path)
    return build_scheduler(name, path=path, shift=steps_shift(pipeline.scheduler))
