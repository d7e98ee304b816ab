"""The images of a model: opened from a pipeline, a run or a checkpoint; generated, and kept as PNG files."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uvit import __version__
from uvit.checkpoint.folder import RECORD, checkpoint_folders, newer_checkpoint, read_checkpoint, training_facts
from uvit.config.evaluate import Scheduler
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.evaluate.image_sets import CHUNK, LoadedImages
from uvit.evaluate.prompts import Prompt, prompts_sha256
from uvit.export.convert import build_pipeline, check_fit, encoders_of_run, open_checkpoint
from uvit.export.reconstruct import open_average
from uvit.progress import Progress
from uvit.sample.command import sample_batch
from uvit.sample.files import is_generated, numbered, read_image, save_image
from uvit.sample.jobs import ImageJob
from uvit.sample.load import named_scheduler, open_pipeline
from uvit.sample.pipeline import UViTPipeline
from uvit.weights.detect import INDEX
from uvit.weights.encoders import are_truncated, fingerprint, quiet


@dataclass(frozen=True)
class Setting:
    """One way to sample. A sweep has several."""

    guidance_scale: float
    guidance_interval: tuple[float, float]
    num_inference_steps: int
    scheduler: Scheduler
    ema: str  # ema, raw, or the length of an average

    def label(self, names: Sequence[str]) -> str:
        """Such as `guidance_scale 2, ema raw`: the fields that differ within the sweep."""
        values = {**asdict(self), "guidance_interval": "{:g} {:g}".format(*self.guidance_interval)}
        return ", ".join(f"{name} {values[name]}" for name in names)


def is_model(name: str) -> bool:
    """Whether a path is a pipeline folder, a training run or a checkpoint; everything else holds images."""
    path = Path(name)
    holds = any((folder / file).is_file() for folder in (path, path / "pipeline") for file in (INDEX, RECORD))
    return holds or (path.is_dir() and bool(checkpoint_folders(path)))


@dataclass(frozen=True)
class Model:
    """A pipeline on its device, and what was opened.

    Attributes:
        hashes: SHA-256 of the weights of each network.
    """

    pipeline: UViTPipeline
    path: Path
    hashes: dict[str, str]

    def scheduler(self, name: Scheduler) -> Any:
        """A new solver. Raises UserError if it is the fitted one, and there is none."""
        return named_scheduler(self.pipeline, self.path, name)


def open_model(name: str, weights: str, device: str, dtype: str) -> Model:
    """The model of a path with its EMA weights, its raw ones, or EMA weights of a length.

    A run that has a pipeline of its last checkpoint gives that for its EMA weights; otherwise the last checkpoint is
    opened. Raises UserError if it does not have the weights.
    """
    path = Path(name)
    opened = next((folder for folder in (path, path / "pipeline") if (folder / INDEX).is_file()), None)
    is_latest = opened is not None and (opened == path or newer_checkpoint(opened) is None)
    if weights == "ema" and opened is not None and is_latest:
        pipeline = open_pipeline(str(opened), device, dtype)
    else:
        is_length = weights not in ("ema", "raw")
        checkpoints = [path] if (path / RECORD).is_file() and not is_length else checkpoint_folders(path)
        if not checkpoints and is_length:
            raise UserError(f"--ema_lengths {weights}: {name} is not a run with snapshots; give a run's folder")
        if not checkpoints:
            raise UserError(f"--ema raw: {name} has one set of weights; give a run or a checkpoint")
        opened = checkpoints[-1]
        if is_length:
            components = open_average(path, float(weights))
        else:
            components = open_checkpoint(opened, weights == "ema", **encoders_of_run(opened))
        if weights == "ema" and not components.facts["ema"]:
            raise UserError(f"--ema ema: {opened} has no EMA weights; give --ema raw")
        check_fit(components, opened)
        with quiet():
            pipeline = build_pipeline(components).to(pick_device(device), getattr(torch, dtype))
        pipeline.set_progress_bar_config(disable=True)
    networks = {network: getattr(pipeline, network) for network in ("unet", "vqvae", "text_encoder")}
    hashes = {f"{name}_sha256": fingerprint(each) for name, each in networks.items() if each is not None}
    return Model(pipeline, opened, hashes)


def trained_on(name: str) -> str | None:
    """The features that the run of a pipeline or a checkpoint was trained on, as it records them; None: it does not."""
    path = Path(name)
    checkpoints = [path] if (path / RECORD).is_file() else checkpoint_folders(path)
    records = [training_facts(path), training_facts(path / "pipeline")]
    records += [read_checkpoint(checkpoint).record for checkpoint in checkpoints[-1:]]
    found = (record["config"].get("feature_path") for record in records if record.get("config"))
    return next((str(features) for features in found if features), None)


class GeneratedImages:
    """Image i is generated from prompt i with seed + i, and kept as FOLDER/0000i-the-prompt.png.

    Batches begin at multiples of the batch size, whoever generates them, so that an image is always the same.
    """

    files_sha256 = None

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        setting: Setting,
        seed: int,
        batch_size: int,
        dtype: str,
        folder: Path,
    ):
        self.model, self.prompts, self.setting, self.folder = model, prompts, setting, folder
        self.scheduler = model.scheduler(setting.scheduler)
        self.batch_size = batch_size
        self.chunk = batch_size * max(1, CHUNK // batch_size)
        self.jobs = [ImageJob(i, prompt.text, seed + i) for i, prompt in enumerate(prompts)]
        self.description: dict[str, Any] = {
            "model": str(model.path),
            **model.hashes,
            **asdict(setting),
            "seed": seed,
            "batch_size": batch_size,
            "dtype": dtype,
            "num_images": len(prompts),
            "prompts_sha256": prompts_sha256(prompts),
            "resolution": list(model.pipeline.resolution),
        }
        tokenizer, num_tokens = model.pipeline.tokenizer, model.pipeline.unet.config.num_text_tokens
        if num_truncated := int(are_truncated(tokenizer, [prompt.text for prompt in prompts], num_tokens).sum()):
            self.description["num_truncated_prompts"] = num_truncated

    def __len__(self) -> int:
        return len(self.jobs)

    def load(self, start: int, stop: int, progress: Progress) -> LoadedImages:
        """Generate what is not yet there of images start..stop - 1; `start` is a multiple of the batch size."""
        existing = numbered(self.folder)
        images: list[Image.Image] = []
        for first in range(start, stop, self.batch_size):
            images += self._batch(self.jobs[first : min(first + self.batch_size, stop)], existing, progress)
        rows = list(range(start, stop))
        return LoadedImages([self.prompts[row].id for row in rows], rows, np.stack([np.asarray(i) for i in images]))

    def _batch(self, jobs: Sequence[ImageJob], existing: dict[int, Path], progress: Progress) -> list[Image.Image]:
        texts = [self._metadata(job) for job in jobs]
        paths = [existing.get(job.number) for job in jobs]
        done = [path for path, text in zip(paths, texts, strict=True) if path and is_generated(path, text, None)]
        if len(done) == len(jobs):
            progress.skip(len(jobs))
            return list(map(read_image, done))
        self.model.pipeline.scheduler = self.scheduler  # settings share the pipeline
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the model reads")  # the report counts them
            images, latents = sample_batch(
                self.model.pipeline,
                [job.prompt for job in jobs],
                [job.seed for job in jobs],
                progress,
                guidance_scale=self.setting.guidance_scale,
                guidance_interval=self.setting.guidance_interval,
                num_inference_steps=self.setting.num_inference_steps,
            )
        for job, image, latent, text in zip(jobs, images, latents, texts, strict=True):
            save_image(self.folder / job.file_name, image, latent, text, None)
        return images

    def _metadata(self, job: ImageJob) -> dict[str, str]:
        names = ("unet_sha256", "vqvae_sha256", "text_encoder_sha256", "dtype", *asdict(self.setting))
        settings = {name: str(self.description[name]) for name in names if name in self.description}
        return {"software": f"uvit {__version__}", **settings, "prompt": job.prompt, "seed": str(job.seed)}


def folder_name(label: str) -> str:
    """A setting as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")
