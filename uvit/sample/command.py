"""`uvit sample`: prompts in, PNG files out.

`sample` is the command. `run` generates and writes the images of one call; `sample_batch` generates a batch without
files, also for `uvit evaluate`. The jobs and their batches come from `jobs`, the files from `files`, the pipeline from
`load`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uvit.compiling import compile_blocks
from uvit.config.sample import SPEEDS, SampleConfig
from uvit.config.sharding import resolve_shard
from uvit.device import has_bf16, pick_device
from uvit.errors import UserError
from uvit.images import center_crop, to_rgb
from uvit.lock import WriterLock
from uvit.model import blocks_in_order
from uvit.progress import Progress, is_terminal, write
from uvit.sample.files import check_writable, is_generated, metadata, next_number, numbered, save_image, save_sheet
from uvit.sample.fit import NUM_REFERENCE_STEPS, fit_plan, read_plans, relative_error, solve, store_plan
from uvit.sample.interactive import interactive
from uvit.sample.jobs import ImageJob, Variant, image_jobs, job_batches, list_variants
from uvit.sample.load import find_pipeline, open_pipeline
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import MultistepScheduler, describe_guidance
from uvit.sources.decode import decode_image
from uvit.sources.types import PairError
from uvit.weights.encoders import fingerprint

MIN_FIT_IMAGES = 8


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline on its device, and what the metadata of its images say of its weights."""

    pipeline: UViTPipeline
    weights: dict[str, str]


@dataclass(frozen=True)
class SampleResult:
    """The images of one call of `run`."""

    paths: list[Path]
    num_existing: int  # how many of them existed before
    sheet: Path | None


def sample_batch(
    pipeline: UViTPipeline, prompts: list[str], seeds: list[int], progress: Progress, **options: Any
) -> tuple[list[Image.Image], Tensor]:
    """Generate one batch: its images, and the latents (B, C, h, w) that the VAE decoded.

    All noise of an image comes from its own generator. So its batch only affects rounding: matrix products of another
    size add in another order.

    progress: counts the images, in fractions while they are denoised.
    """
    last: dict[str, Tensor] = {}
    done_before = progress.done

    def remember(_: UViTPipeline, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(values)
        progress.update(len(prompts) / (len(pipeline.scheduler.timesteps) + 1))  # the VAE is one more
        return values

    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipeline(
        prompts, generator=generator, callback_on_step_end=remember, return_dict=False, **options
    )[0]  # fmt: skip
    progress.update(done_before + len(prompts) - progress.done)  # an image that starts from another took fewer steps
    return images, last["latents"]


def sample(config: SampleConfig) -> None:
    config = with_dtype(config.resolved())
    if config.negative_prompt and {*config.guidance_scale} == {1.0}:
        print("warning: --negative_prompt: has no effect at --guidance_scale 1, which turns guidance off")
    with print_warnings():
        if config.fit_schedule:
            fit_schedule(config)
            return
        if is_interactive(config):
            load = lru_cache(maxsize=None)(lambda path: load_pipeline(config, path))
            load(list_variants(config)[0].pipeline)  # errors and the wait come before the first prompt
            interactive(config, lambda config, prompt: sample_and_print(config, prompt, load))
            return
        result = run(config, read_prompts(config), lru_cache(maxsize=1)(lambda path: load_pipeline(config, path)))
    part, num_parts = resolve_shard(config.shard)
    count = len(result.paths)
    summary = [f"{count} image{'s'[: count != 1]} in {config.output_dir}"]
    summary += [f"{result.num_existing} of them existed already"] if result.num_existing else []
    summary += [f"part {part} of {num_parts}"] if num_parts > 1 else []
    summary += [f"contact sheet: {result.sheet}"] if result.sheet else []
    print("; ".join(summary))


def with_dtype(config: SampleConfig) -> SampleConfig:
    """The same with a dtype for `auto`."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype="bfloat16" if has_bf16(pick_device(config.device)) else "float32")


def fit_schedule(config: SampleConfig) -> None:
    """Fit a solver for each speed at each guidance scale, and store the solvers in the pipeline."""
    jobs = image_jobs(config, read_prompts(config), 0)
    if len(jobs) < MIN_FIT_IMAGES:
        raise UserError(
            f"--fit_schedule: {len(jobs)} images are too few to fit to; give {MIN_FIT_IMAGES} prompts or more, or "
            "raise --num_images_per_prompt"
        )
    folder = find_pipeline(config.pipeline)
    check_writable(folder / "scheduler", f"--pipeline {config.pipeline}")
    pipeline = load_pipeline(config, folder).pipeline
    total = len(config.guidance_scale) * (NUM_REFERENCE_STEPS + sum(SPEEDS.values()))
    progress = Progress("fit", total, "step", bar=not config.disable_tqdm)

    def count(_: UViTPipeline, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        progress.update()
        return values

    for scale in config.guidance_scale:

        def sample_latents(scheduler: MultistepScheduler, num_steps: int, scale: float = scale) -> Tensor:
            pipeline.scheduler = scheduler
            return pipeline(
                [job.prompt for job in jobs],
                generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
                guidance_scale=scale,
                guidance_interval=config.guidance_interval,
                num_inference_steps=num_steps,
                negative_prompt=config.negative_prompt,
                output_type="latent",
                callback_on_step_end=count,
                return_dict=False,
            )[0]

        reference = solve(sample_latents, pipeline.conventions.path)
        guidance = (scale, *config.guidance_interval)
        for name, num_steps in SPEEDS.items():
            plan, latents = fit_plan(sample_latents, reference, num_steps, guidance)
            path = store_plan(folder, plan)
            error = relative_error(latents, reference.x_0)
            solver = f"--speed {name}, {num_steps} steps for {describe_guidance(guidance)}"
            write(f"{solver}: error {error:.1%}; stored in {path}")
    progress.close()


def is_interactive(config: SampleConfig) -> bool:
    no_prompts = not config.prompts and config.prompts_file is None
    return no_prompts and not config.skip_existing and resolve_shard(config.shard)[1] == 1 and is_terminal(sys.stdin)


def sample_and_print(config: SampleConfig, prompt: str, load: Callable[[Path], LoadedPipeline]) -> None:
    """Generate the images of one prompt and print their paths."""
    single = config.num_images_per_prompt * len(list_variants(config)) == 1
    result = run(dataclasses.replace(config, grid=False, columns=None) if single else config, [prompt], load)
    for path in [*result.paths, *([result.sheet] if result.sheet else [])]:
        print(path)


def run(config: SampleConfig, prompts: Sequence[str], load: Callable[[Path], LoadedPipeline]) -> SampleResult:
    """Generate this process's part of the images, in every variant.

    Raises UserError if a file with the name of an image exists and is another image, or if another process is
    generating this part.
    """
    part, num_parts = resolve_shard(config.shard)
    variants = list_variants(config)
    for variant in variants:
        check_writable(variant.folder, f"--output_dir {config.output_dir}")
        if config.scheduler == "fitted":
            check_fitted(config, variant)
    lock = Path(config.output_dir) / f".part-{part}-of-{num_parts}.lock"
    with WriterLock(lock, f"--output_dir {config.output_dir}"):
        return generate_part(config, prompts, load, variants, part, num_parts)


def generate_part(
    config: SampleConfig,
    prompts: Sequence[str],
    load: Callable[[Path], LoadedPipeline],
    variants: list[Variant],
    part: int,
    num_parts: int,
) -> SampleResult:
    from_zero = config.skip_existing or num_parts > 1  # other processes, or an earlier run, use the same numbers
    first = 0 if from_zero else max(next_number(variant.folder) for variant in variants)
    jobs = image_jobs(config, prompts, first)
    batches = job_batches(jobs, config.batch_size, part, num_parts)
    paths, num_existing, shared = [], 0, None
    for variant in variants if from_zero and len(variants) > 1 else ():  # before any image is written
        existing_images(config, variant, batches, metadata(config, variant, {}))
    total, silent = len(variants) * sum(map(len, batches)), int(os.environ.get("RANK", "0")) > 0
    with Progress("sample", total, "image", bar=not (config.disable_tqdm or silent), lines=not silent) as progress:
        for variant in variants:
            loaded = load(variant.pipeline)
            options = pipeline_options(config, variant, loaded.pipeline)
            settings = metadata(config, variant, loaded.weights)
            shared = settings if shared is None else {k: v for k, v in shared.items() if settings.get(k) == v}
            existing = existing_images(config, variant, batches, settings) if from_zero else set()
            for batch in batches:
                targets = [variant.folder / job.file_name for job in batch]
                done = [job.number in existing for job in batch]
                if all(done):
                    progress.skip(len(batch))
                else:  # generate the whole batch, so that each image is the same to the bit
                    images, latents = sample_batch(
                        loaded.pipeline, [job.prompt for job in batch], [job.seed for job in batch], progress, **options
                    )
                    for i in (i for i in range(len(batch)) if not done[i]):
                        text = text_of(batch[i], settings)
                        save_image(targets[i], images[i], latents[i], text, config.save_latents)
                paths += targets
                num_existing += sum(done)
    sheet = save_sheet(config, variants, jobs, shared or {}) if config.grid else None
    return SampleResult(paths, num_existing, sheet)


def existing_images(
    config: SampleConfig, variant: Variant, batches: Sequence[Sequence[ImageJob]], settings: Mapping[str, str]
) -> set[int]:
    """The numbers of the images that exist already.

    Raises UserError if there are any and --skip_existing is not given, or if one was made with other settings.
    """
    there = numbered(variant.folder)
    found = set()
    for job in (job for batch in batches for job in batch if job.number in there):
        path = there[job.number]
        if not config.skip_existing:
            raise UserError(f"{path}: exists already; add --skip_existing to resume, or choose another --output_dir")
        if is_generated(path, text_of(job, settings), config.save_latents):
            found.add(job.number)
    return found


def text_of(job: ImageJob, settings: Mapping[str, str]) -> dict[str, str]:
    """The metadata of an image."""
    return {**settings, "prompt": job.prompt, "seed": str(job.seed)}


def check_fitted(config: SampleConfig, variant: Variant) -> None:
    """Raises UserError if the pipeline has no fitted solver for these settings."""
    plans = read_plans(variant.pipeline)
    scheduler = MultistepScheduler(plans, plans[0].path if plans else "vp")
    scheduler.guidance = (variant.guidance_scale, *config.guidance_interval)
    try:
        scheduler.plan_for(config.num_inference_steps)
    except UserError as error:
        raise UserError(f"--pipeline {variant.pipeline}: {error}") from None


def pipeline_options(config: SampleConfig, variant: Variant, pipeline: UViTPipeline) -> dict[str, Any]:
    """The arguments of the pipeline besides prompts and noise."""
    options: dict[str, Any] = {
        "guidance_scale": variant.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "num_inference_steps": config.num_inference_steps,
        "negative_prompt": config.negative_prompt,
    }
    if config.init_image is not None:
        image = load_input_image(config.init_image, "init_image")
        options |= {"image": center_crop(image, pipeline.resolution[::-1]), "strength": config.strength}
        if config.mask is not None:
            mask = load_input_image(config.mask, "mask")
            if mask.size != image.size:
                mask_size, image_size = ("{} x {}".format(*each.size) for each in (mask, image))
                raise UserError(f"--mask {config.mask}: has {mask_size} pixels, and --init_image has {image_size}")
            options["mask_image"] = center_crop(mask, pipeline.resolution[::-1])
    return options


def load_input_image(path: str, flag: str) -> Image.Image:
    """An upright RGB image in sRGB; transparent parts become white."""
    try:
        return to_rgb(decode_image(Path(path).read_bytes(), path, f"--{flag}"))
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be read ({error.strerror})") from None
    except PairError as error:
        raise UserError(str(error)) from None


def load_pipeline(config: SampleConfig, path: Path) -> LoadedPipeline:
    offload = config.enable_model_cpu_offload
    pipeline = open_pipeline(str(path), config.device, config.dtype, config.scheduler, offload)
    if config.compile:
        compile_blocks(blocks_in_order(pipeline.unet))
    if config.enable_vae_slicing:
        pipeline.enable_vae_slicing()
    if config.enable_vae_tiling:
        pipeline.enable_vae_tiling()
    return LoadedPipeline(pipeline, fingerprints_of(pipeline, config.num_inference_steps))


def fingerprints_of(pipeline: UViTPipeline, num_inference_steps: int) -> dict[str, str]:
    """SHA-256 of the U-ViT, and of all else that makes images: VAE, text encoder, conventions, and a fitted solver."""
    others = [fingerprint(each) for each in (pipeline.vqvae, pipeline.text_encoder) if each is not None]
    others.append(json.dumps(dataclasses.asdict(pipeline.conventions)))
    if isinstance(pipeline.scheduler, MultistepScheduler):
        plans = [plan for plan in pipeline.scheduler.plans if len(plan.log_snrs) == num_inference_steps]
        others.append(json.dumps([dataclasses.asdict(plan) for plan in plans]))
    whole = hashlib.sha256("\n".join(others).encode()).hexdigest()
    return {"unet_sha256": fingerprint(pipeline.unet), "pipeline_sha256": whole}


@contextlib.contextmanager
def print_warnings() -> Iterator[None]:
    """Print each of the pipeline's own warnings once, as one line."""
    printed = set()

    def print_once(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            write(f"uvit sample: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="the model reads")
        warnings.showwarning = print_once
        yield


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the command line, then those of the file. `-`, or a pipe without any prompt, is standard input."""
    arguments = config.prompts
    if not arguments and config.prompts_file is None and sys.stdin and not is_terminal(sys.stdin):
        arguments = ("-",)
    if "-" in arguments and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--prompts -: several processes cannot share standard input; give a --prompts_file")
    prompts = []
    for prompt in arguments:
        prompts += _lines(sys.stdin.read()) if prompt == "-" else [prompt]
    if config.prompts_file is not None:
        try:
            prompts += _lines(Path(config.prompts_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {config.prompts_file}: cannot be read ({error})") from None
    if not prompts:
        raise UserError(
            "--prompts: there are none; give prompts in quotes, a --prompts_file, or one prompt per line through a pipe"
        )
    return prompts


def _lines(text: str) -> list[str]:
    """The lines that are not empty, without the byte order mark that some editors write first."""
    return [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
