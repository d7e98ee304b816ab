"""A model in the memory of a worker: its pipeline, and one image of it as steps."""

import dataclasses
import gc
import io
import warnings
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops
from torch import Tensor, nn

from uvit.config.sample import SPEEDS
from uvit.device import has_bf16, pick_device
from uvit.errors import UserError
from uvit.export.convert import build_pipeline, encoders_of_run, open_checkpoint
from uvit.images import center_crop, to_rgb, write_png
from uvit.sample.batching import SharedNetwork
from uvit.sample.denoise import NetworkInput
from uvit.sample.edit import STRENGTH
from uvit.sample.files import metadata
from uvit.sample.fit import read_plans
from uvit.sample.jobs import Variant
from uvit.sample.load import open_pipeline
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import MultistepScheduler, SolverPlan, build_scheduler, scheduler_names, steps_shift
from uvit.sample.stepwise import ImageSettings, image_steps, preview
from uvit.serve.requests import ImageTask, ModelRef
from uvit.serve.worker import WorkerSettings
from uvit.sources.decode import decode_image
from uvit.sources.types import PairError
from uvit.weights.encoders import fingerprint, quiet

Crops = tuple[Image.Image | None, Image.Image | None]  # of an image and its mask


class LoadedModel:
    """A pipeline in memory."""

    def __init__(self, ref: ModelRef, settings: WorkerSettings):
        if settings.dtype == "auto":  # as `uvit sample`
            bf16 = has_bf16(pick_device(settings.device))
            settings = dataclasses.replace(settings, dtype="bfloat16" if bf16 else "float32")
        self.ref = ref
        self.dtype: Any = settings.dtype
        open_it = open_checkpoint_pipeline if ref.is_checkpoint else open_pipeline_folder
        self.pipeline = open_it(ref, settings)
        self.pipeline.set_progress_bar_config(disable=True)
        copy_weights(self.pipeline)
        self.network = SharedNetwork(self.pipeline.unet, settings.max_batch_size)
        self.unet_sha256 = fingerprint(self.pipeline.unet)
        self.embed = lru_cache(maxsize=128)(self._embed)
        self.crops: tuple[str, Crops | str] = ("", (None, None))  # of the request that was last asked for, by its id
        self.description = self._describe()

    def _describe(self) -> dict[str, Any]:
        names = scheduler_names(self.pipeline.conventions.path)
        fitted = {len(plan.log_snrs) for plan in self._plans()}
        return {
            "resolution": list(self.pipeline.resolution),
            "schedulers": [*names, *(["fitted"] if fitted else [])],
            "speeds": [name for name, steps in SPEEDS.items() if steps in fitted],
            "latents": not self.pipeline.conventions.is_pixels,
            "unet_sha256": self.unet_sha256,
        }

    def _plans(self) -> list[SolverPlan]:
        return [] if self.ref.is_checkpoint else read_plans(Path(self.ref.path))

    def scheduler(self, name: str) -> Any:
        path = self.pipeline.conventions.path
        if name == "fitted":
            return MultistepScheduler(self._plans(), path)
        return build_scheduler(name, path=path, shift=steps_shift(self.pipeline.scheduler))

    @torch.no_grad()
    def _embed(self, text: str) -> tuple[Tensor, list[str]]:
        """The text embeddings of a prompt, and what is to be said of it. They do not depend on the other prompts."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            context = self.pipeline._context("prompt", text, None)
        return context, [str(w.message) for w in caught if str(w.message).startswith("the model reads")]

    def steps(self, task: ImageTask, max_pixels: int) -> tuple[Generator[NetworkInput, Tensor, Image.Image], int]:
        """The steps of an image, and how many times they ask the network."""
        config = task.config
        image, mask = self.uploads(task, max_pixels)
        height, width = self.size(task)
        (scale,) = config.guidance_scale
        scheduler = self.scheduler(config.scheduler)
        settings = ImageSettings(
            config.seed, config.num_inference_steps, scale, config.guidance_interval,
            height, width, image, mask, config.strength,
        )  # fmt: skip
        context = self.embed(config.prompts[0])[0]
        negative = self.embed(config.negative_prompt or "")[0] if scale != 1 else context
        steps = image_steps(self.pipeline, scheduler, context, negative, settings)
        share = 1.0 if image is None else config.strength or (STRENGTH if mask is None else 1.0)
        count = max(1, int(config.num_inference_steps * share + 1e-9))
        return steps, count * scheduler.order - (scheduler.order - 1)

    def size(self, task: ImageTask) -> tuple[int, int]:
        """(height, width) of an image. Raises UserError if the model has no such size."""
        height, width = task.size or self.pipeline.resolution
        try:
            shape = self.pipeline._latents_shape(1, height, width)
            self.pipeline.unet._patch_grid(*shape[2:])
        except ValueError as error:
            raise UserError(f"--size {width}x{height}: {error}") from None
        return height, width

    def uploads(self, task: ImageTask, max_pixels: int) -> Crops:
        """The image and the mask of a task, in the size of the image to generate. Raises UserError.

        They are read once: the images of a request follow one another.
        """
        if task.image is None:
            return None, None
        if self.crops[0] != task.id:
            try:
                self.crops = task.id, self._read_uploads(task, max_pixels)
            except UserError as error:
                self.crops = task.id, str(error.args[0])
        found = self.crops[1]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _read_uploads(self, task: ImageTask, max_pixels: int) -> Crops:
        size = self.size(task)[::-1]
        opened = []
        for name, data in (("image", task.image), ("mask", task.mask)):
            if data is None:
                continue
            try:
                opened.append(decode_image(data, "the upload", f"--{name}", max_pixels))
            except PairError as error:
                raise UserError(str(error)) from None
        image, *masks = opened
        for mask in masks:
            if mask.size != image.size:
                sizes = ["{} x {}".format(*each.size) for each in (mask, image)]
                raise UserError(f"--mask: has {sizes[0]} pixels, and --image has {sizes[1]}")
        crop = center_crop(to_rgb(image), size)
        return crop, center_crop(repainted(masks[0]), size) if masks else None

    def preview(self, task: ImageTask, asked: NetworkInput, prediction: Tensor) -> Image.Image:
        return preview(self.pipeline, asked, prediction, task.config.guidance_scale[0])

    def metadata(self, task: ImageTask) -> dict[str, str]:
        """What the PNG says: as `uvit sample` writes it, with the name of the model in place of its path."""
        config = dataclasses.replace(task.config, dtype=self.dtype)
        variant = Variant(Path(task.model.id), config.guidance_scale[0], "", Path())
        uploads = {"init_image": task.image, "mask": task.mask}
        text = metadata(
            config, variant, {"unet_sha256": self.unet_sha256}, {k: v for k, v in uploads.items() if v is not None}
        )
        return {**text, "prompt": config.prompts[0], "seed": str(config.seed)}

    def warnings(self, task: ImageTask) -> list[str]:
        config = task.config
        return [*self.embed(config.prompts[0])[1], *self.embed(config.negative_prompt or "")[1]]


def repainted(mask: Image.Image) -> Image.Image:
    """The mask of OpenAI's API, whose transparent parts are repainted, or one without transparency, whose white parts
    are: -> white is repainted.
    """
    if mask.mode in ("LA", "RGBA"):
        return ImageChops.invert(mask.getchannel("A")).convert("RGB")
    return to_rgb(mask)


def open_pipeline_folder(ref: ModelRef, settings: WorkerSettings) -> UViTPipeline:
    return open_pipeline(ref.path, settings.device, settings.dtype)


def open_checkpoint_pipeline(ref: ModelRef, settings: WorkerSettings) -> UViTPipeline:
    """A checkpoint of a run, with its EMA weights, converted in memory."""
    checkpoint = Path(ref.path)
    with quiet():
        pipeline = build_pipeline(open_checkpoint(checkpoint, **encoders_of_run(checkpoint)))
        return pipeline.to(pick_device(settings.device), getattr(torch, settings.dtype))


def copy_weights(pipeline: UViTPipeline) -> None:
    """Copy weights on the CPU, tensor by tensor, out of the files that are mapped: who writes into one would change
    them, or end this process.
    """
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor.device.type == "cpu":
                    tensor.data = tensor.data.clone()


def free_memory() -> None:
    """Give back the memory of models that were dropped: their parts refer to one another."""
    gc.collect()
    torch.cuda.empty_cache()


def png_bytes(image: Image.Image, text: dict[str, str]) -> bytes:
    file = io.BytesIO()
    write_png(image, file, text)
    return file.getvalue()


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
