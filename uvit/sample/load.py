"""From what --pipeline names to a pipeline on its device."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from uvit.checkpoint.folder import RECORD, checkpoint_folders
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.sample.fit import read_plans
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import DEFAULT_SCHEDULER, MultistepScheduler, build_scheduler
from uvit.weights.detect import INDEX
from uvit.weights.encoders import quiet


def find_pipeline(path: str, flag: str = "pipeline") -> Path:
    """The pipeline's folder: that one itself, or what a training run left in it.

    Raises UserError, saying what to do, where there is none.
    """
    folder = Path(path).expanduser()
    for place in (folder, folder / "pipeline"):
        if (place / INDEX).is_file():
            return place
    where = f"--{flag} {path}:"
    if folder.is_file():
        raise UserError(f"{where} is a file; make a pipeline of weights: uvit convert {path} pipeline")
    if not folder.is_dir():
        raise UserError(f"{where} there is no such folder; give OUTPUT_DIR/pipeline of a finished training run")
    if (folder / RECORD).is_file():
        goal = folder.with_name(f"pipeline-{folder.name.removeprefix('checkpoint-')}")
        raise UserError(f"{where} is a training checkpoint; make a pipeline of it: uvit convert {folder} {goal}")
    if found := checkpoint_folders(folder):
        how = f"uvit convert {found[-1]} {folder / 'pipeline'}"
        raise UserError(f"{where} is a training run that is not finished; make a pipeline of a checkpoint: {how}")
    raise UserError(
        f"{where} has no {INDEX}, so it is no pipeline folder; give OUTPUT_DIR/pipeline of a finished training run, or "
        f"make a pipeline of weights: uvit convert {path} pipeline"
    )


def open_pipeline(
    path: str,
    device: str,
    dtype: str = "float32",
    scheduler: str = DEFAULT_SCHEDULER,
    model_cpu_offload: bool = False,
) -> UViTPipeline:
    """The pipeline of a folder, on its device, with the scheduler asked for. Raises UserError where there is none."""
    folder, chosen = find_pipeline(path), pick_device(device)
    if model_cpu_offload and chosen.type == "cpu":
        raise UserError(f"--enable_model_cpu_offload: spares a GPU's memory, and --device {device} is the CPU here")
    with quiet():
        try:
            pipeline = UViTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # of files that are cut short, or missing
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--pipeline {folder}: is not whole, or its parts do not fit ({reason})") from None
    if model_cpu_offload:
        pipeline.enable_model_cpu_offload(device=chosen)
    else:
        pipeline.to(chosen)
    pipeline.scheduler = MultistepScheduler(read_plans(folder)) if scheduler == "fitted" else build_scheduler(scheduler)
    pipeline.set_progress_bar_config(disable=True)  # commands show their own progress
    return pipeline
