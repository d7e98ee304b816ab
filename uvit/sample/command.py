"""`uvit sample`: prompts in, PNG files out."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from uvit.config.sample import SPEEDS, SampleConfig
from uvit.config.sharding import resolve_shard
from uvit.errors import UserError
from uvit.progress import Progress, write
from uvit.sample.files import is_generated, metadata, need_writable, next_number, numbered, save_image, save_sheet
from uvit.sample.fit import NUM_REFERENCE_STEPS, fit_plan, read_plans, relative_error, solve, store_plan
from uvit.sample.interactive import interactive
from uvit.sample.jobs import ImageJob, Variant, image_jobs, job_batches, list_variants
from uvit.sample.load import find_pipeline, open_pipeline
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import MultistepScheduler, describe_guidance
from uvit.sources.decode import decode_image
from uvit.sources.types import PairError
from uvit.weights.encoders import fingerprint

MIN_FITTED_TO = 8  # pictures


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline, ready, and what its network is known by."""

    pipeline: UViTPipeline
    unet_sha256: str


@dataclass(frozen=True)
class SampleResult:
    """What came of it."""

    paths: list[Path]
    num_there: int  # that were there already
    sheet: Path | None


def generate(
    pipeline: UViTPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 8,
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    negative_prompt: str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, str, int, Image.Image]]:
    """Draw image i of prompts[i] and seeds[i]; yields (i, prompt, seed, image) in order.

    All noise of an image comes from its own generator, so the batch it is drawn in makes no difference beyond
    rounding: matrix products of another size add in another order.
    """
    for start in range(0, len(prompts), batch_size):
        batch = range(start, min(start + batch_size, len(prompts)))
        images, _ = sample_batch(
            pipeline,
            [prompts[i] for i in batch],
            [seeds[i] for i in batch],
            progress,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            negative_prompt=negative_prompt,
        )
        for i, image in zip(batch, images, strict=True):
            yield i, prompts[i], seeds[i], image


def sample_batch(
    pipeline: UViTPipeline, prompts: list[str], seeds: list[int], progress: Progress | None = None, **options: Any
) -> tuple[list[Image.Image], Tensor]:
    """One batch: its images, and the latents (B, C, h, w) that they were decoded from.

    progress: counts the images, in fractions while they are denoised.
    """
    last: dict[str, Tensor] = {}
    done_before = 0.0 if progress is None else progress.done

    def remember(_: UViTPipeline, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(values)
        if progress is not None:
            progress.update(len(prompts) / (len(pipeline.scheduler.timesteps) + 1))  # the VAE is one more
        return values

    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipeline(
        prompts, generator=generator, callback_on_step_end=remember, return_dict=False, **options
    )[0]  # fmt: skip
    if progress is not None:  # an image that starts from another one took fewer steps
        progress.update(done_before + len(prompts) - progress.done)
    if not torch.isfinite(last["latents"]).all():
        raise UserError(
            f"{prompts[0]!r}: came out as NaN or infinite; with --dtype float16 try bfloat16, "
            "otherwise look whether the network's weights are whole"
        )
    return images, last["latents"]


def sample(config: SampleConfig) -> None:
    config = config.resolved()
    with print_warnings():
        if config.fit_schedule:
            fit_schedule(config)
            return
        if is_interactive(config):
            studio = lru_cache(maxsize=None)(lambda path: load_pipeline(config, path))
            studio(
                list_variants(config)[0].pipeline
            )  # a mistake is told, and the wait is over, before the first prompt
            interactive(config, lambda config, prompt: sample_and_print(config, prompt, studio))
            return
        drawn = run(config, read_prompts(config), lru_cache(maxsize=1)(lambda path: load_pipeline(config, path)))
    part, num_parts = resolve_shard(config.shard)
    words = [f"{len(drawn.paths)} images in {config.output_dir}"]
    words += [f"{drawn.num_there} of them were there already"] if drawn.num_there else []
    words += [f"part {part} of {num_parts}"] if num_parts > 1 else []
    words += [f"contact sheet: {drawn.sheet}"] if drawn.sheet else []
    print("; ".join(words))


def fit_schedule(config: SampleConfig) -> None:
    """Fit a solver for each of the speeds at each guidance scale, and store them with the pipeline."""
    pictures = image_jobs(config, read_prompts(config), 0)
    if len(pictures) < MIN_FITTED_TO:
        raise UserError(
            f"--fit_schedule: {len(pictures)} pictures are too few to fit to; give {MIN_FITTED_TO} prompts or more, or "
            "--num_images_per_prompt"
        )
    folder = find_pipeline(config.pipeline)
    need_writable(folder / "scheduler", f"--pipeline {config.pipeline}")
    pipeline = load_pipeline(config, folder).pipeline
    total = len(config.guidance_scale) * (NUM_REFERENCE_STEPS + sum(SPEEDS.values()))
    progress = Progress("fit", total, "step", bar=not config.disable_tqdm)

    def count(_: UViTPipeline, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        progress.update()
        return values

    for scale in config.guidance_scale:

        def latents_by(scheduler: MultistepScheduler, num_steps: int, scale: float = scale) -> Tensor:
            pipeline.scheduler = scheduler
            return pipeline(
                [picture.prompt for picture in pictures],
                generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures],
                guidance_scale=scale,
                guidance_interval=config.guidance_interval,
                num_inference_steps=num_steps,
                negative_prompt=config.negative_prompt,
                output_type="latent",
                callback_on_step_end=count,
                return_dict=False,
            )[0]

        reference, guidance = solve(latents_by), (scale, *config.guidance_interval)
        for name, num_steps in SPEEDS.items():
            plan, drawn = fit_plan(latents_by, reference, num_steps, guidance)
            path = store_plan(folder, plan)
            error = relative_error(drawn, reference.x_0)
            what = f"--speed {name}, {num_steps} steps for {describe_guidance(guidance)}"
            write(f"{what}: off by {error:.1%}; stored in {path}")
    progress.close()


def is_interactive(config: SampleConfig) -> bool:
    no_prompts = not config.prompts and config.prompts_file is None
    return no_prompts and not config.skip_existing and resolve_shard(config.shard)[1] == 1 and sys.stdin.isatty()


def sample_and_print(config: SampleConfig, prompt: str, studio: Callable[[Path], LoadedPipeline]) -> None:
    """For a person who waits: where each picture is."""
    alone = config.num_images_per_prompt * len(list_variants(config)) == 1
    drawn = run(dataclasses.replace(config, grid=False, columns=None) if alone else config, [prompt], studio)
    for path in [*drawn.paths, *([drawn.sheet] if drawn.sheet else [])]:
        print(path)


def run(config: SampleConfig, prompts: Sequence[str], studio: Callable[[Path], LoadedPipeline]) -> SampleResult:
    """Draw this process's part of the pictures, in every variant.

    Raises UserError where a picture's name is taken by another.
    """
    part, num_parts = resolve_shard(config.shard)
    variants = list_variants(config)
    for variant in variants:
        need_writable(variant.folder, f"--output_dir {config.output_dir}")
        if config.scheduler == "fitted":
            need_fitted(config, variant)
    in_parts = config.skip_existing or num_parts > 1  # then others count on the same numbers
    first = 0 if in_parts else max(next_number(variant.folder) for variant in variants)
    pictures = image_jobs(config, prompts, first)
    batches = job_batches(pictures, config.batch_size, part, num_parts)
    paths, num_there, shared = [], 0, None
    total, silent = len(variants) * sum(map(len, batches)), int(os.environ.get("RANK", "0")) > 0
    with Progress("sample", total, "image", bar=not (config.disable_tqdm or silent), lines=not silent) as progress:
        for variant in variants:
            opened = studio(variant.pipeline)
            options = pipeline_options(config, variant, opened.pipeline)
            settings = metadata(config, variant, opened.unet_sha256)
            shared = settings if shared is None else {k: v for k, v in shared.items() if settings.get(k) == v}
            there = numbered(variant.folder) if in_parts else {}
            for batch in batches:
                texts = [{**settings, "prompt": picture.prompt, "seed": str(picture.seed)} for picture in batch]
                goals = [variant.folder / picture.file_name for picture in batch]
                found = [_is_there(config, there, picture, text) for picture, text in zip(batch, texts, strict=True)]
                if all(found):
                    progress.skip(len(batch))
                else:  # if any is missing, all are drawn: as they were, to the bit
                    images, latents = sample_batch(
                        opened.pipeline, [p.prompt for p in batch], [p.seed for p in batch], progress, **options
                    )
                    for i in (i for i in range(len(batch)) if not found[i]):
                        save_image(goals[i], images[i], latents[i], texts[i], config.save_latents)
                paths += goals
                num_there += sum(found)
    sheet = save_sheet(config, variants, pictures, shared or {}) if config.grid else None
    return SampleResult(paths, num_there, sheet)


def _is_there(config: SampleConfig, there: dict[int, Path], picture: ImageJob, text: dict[str, str]) -> bool:
    path = there.get(picture.number)
    if path is None:
        return False
    if not config.skip_existing:
        raise UserError(f"{path}: is there already; --skip_existing goes on; choose another --output_dir to begin anew")
    return is_generated(path, text, config.save_latents)


def need_fitted(config: SampleConfig, variant: Variant) -> None:
    """Raises UserError where the pipeline has no solver fitted for what is asked."""
    scheduler = MultistepScheduler(read_plans(variant.pipeline))
    scheduler.guidance = (variant.guidance_scale, *config.guidance_interval)
    try:
        scheduler.plan_for(config.num_inference_steps)
    except UserError as error:
        raise UserError(f"--pipeline {variant.pipeline}: {error}") from None


def pipeline_options(config: SampleConfig, variant: Variant, pipeline: UViTPipeline) -> dict[str, Any]:
    """What the pipeline is called with beside prompts and noise."""
    options: dict[str, Any] = {
        "guidance_scale": variant.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "num_inference_steps": config.num_inference_steps,
        "negative_prompt": config.negative_prompt,
    }
    if config.init_image is not None:
        image = load_input_image(config.init_image, "init_image")
        options |= {"image": center_crop(image, pipeline.resolution), "strength": config.strength}
        if config.mask is not None:
            mask = load_input_image(config.mask, "mask")
            if mask.size != image.size:
                here, there = ("{} x {}".format(*each.size) for each in (mask, image))
                raise UserError(f"--mask {config.mask}: has {here} pixels, and --init_image has {there}")
            options["mask_image"] = center_crop(mask, pipeline.resolution)
    return options


def load_input_image(path: str, flag: str) -> Image.Image:
    """Upright, RGB, what is transparent on white."""
    try:
        return decode_image(Path(path).expanduser().read_bytes(), path, f"--{flag}")
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be read ({error.strerror})") from None
    except PairError as error:
        raise UserError(str(error)) from None


def center_crop(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """The largest part of an image, in its middle, that has the proportions of (H, W), scaled to it."""
    return ImageOps.fit(image, (resolution[1], resolution[0]), Image.Resampling.LANCZOS)


def load_pipeline(config: SampleConfig, path: Path) -> LoadedPipeline:
    device, local_rank = config.device, os.environ.get("LOCAL_RANK")
    if device == "auto" and local_rank and torch.cuda.is_available():  # torchrun: a GPU for each process
        device = f"cuda:{int(local_rank) % torch.cuda.device_count()}"
    offload = config.enable_model_cpu_offload
    pipeline = open_pipeline(str(path), device, config.dtype, config.scheduler, offload)
    if config.enable_vae_slicing:
        pipeline.enable_vae_slicing()
    if config.enable_vae_tiling:
        pipeline.enable_vae_tiling()
    return LoadedPipeline(pipeline, fingerprint(pipeline.unet))


@contextlib.contextmanager
def print_warnings() -> Iterator[None]:
    """Each of the pipeline's own warnings once, as a sentence."""
    said = set()

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            write(f"uvit sample: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="the model reads")
        warnings.showwarning = say
        yield


def read_prompts(config: SampleConfig) -> list[str]:
    """Arguments, then the file's lines; standard input for `-`, or if piped and nothing else is given."""
    given = config.prompts
    if not given and config.prompts_file is None and not sys.stdin.isatty():
        given = ("-",)
    if "-" in given and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--prompts -: several processes cannot share standard input; give a --prompts_file")
    prompts = []
    for prompt in given:
        prompts += _lines(sys.stdin.read()) if prompt == "-" else [prompt]
    if config.prompts_file is not None:
        try:
            prompts += _lines(Path(config.prompts_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {config.prompts_file}: cannot be read ({error})") from None
    if not prompts:
        raise UserError(
            "--prompts: there is none; give prompts in quotes, a --prompts_file, or one a line through a pipe"
        )
    return prompts


def _lines(text: str) -> list[str]:
    """Of a file that may begin with a mark of its byte order, as some editors leave it."""
    return [line.strip() for line in text.removeprefix("\ufeff").splitlines() if line.strip()]
