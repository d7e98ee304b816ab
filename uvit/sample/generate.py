"""`uvit sample`: prompts in, PNG files out."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from uvit import __version__
from uvit.config.sample import SampleConfig
from uvit.data.encoders import quiet
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import DEFAULT_SCHEDULER, build_scheduler

MAX_ON_SHEET = 400


def generate(
    pipeline: UViTPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 8,
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    negative_prompt: str | None = None,
) -> Iterator[tuple[int, str, int, Image.Image]]:
    """Draw image i of prompts[i] and seeds[i]; yields (i, prompt, seed, image) in order.

    All noise of an image comes from its own generator, so the batch it is drawn in makes no difference beyond
    rounding: matrix products of another size add in another order.
    """
    for start in range(0, len(prompts), batch_size):
        batch = range(start, min(start + batch_size, len(prompts)))
        images = pipeline(
            prompt=[prompts[i] for i in batch],
            negative_prompt=negative_prompt,
            generator=[torch.Generator("cpu").manual_seed(seeds[i]) for i in batch],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            return_dict=False,
        )[0]
        for i, image in zip(batch, images, strict=True):
            yield i, prompts[i], seeds[i], image


def sample(config: SampleConfig) -> None:
    prompts = [prompt for prompt in read_prompts(config) for _ in range(config.num_images_per_prompt)]
    seeds = [config.seed + i for i in range(len(prompts))]
    pipeline = open_pipeline(config.pipeline, config.device, config.dtype, config.scheduler, config.disable_tqdm)
    output_dir = Path(config.output_dir)
    first = next_number(output_dir)
    settings = metadata(config)

    shown = []
    drawn = generate(
        pipeline,
        prompts,
        seeds,
        config.batch_size,
        config.guidance_scale,
        config.num_inference_steps,
        config.negative_prompt,
    )
    for i, prompt, seed, image in tqdm(drawn, total=len(prompts), unit="image", disable=config.disable_tqdm):
        text = {"prompt": prompt, "seed": str(seed), **settings}
        save_png(image, output_dir / file_name(first + i, prompt), text)
        if i < MAX_ON_SHEET:
            shown.append(image)
    columns = config.columns or (config.num_images_per_prompt if config.num_images_per_prompt > 1 else None)
    sheet = output_dir / "contact_sheet.png"
    save_png(contact_sheet(shown, prompts[: len(shown)], columns), sheet, settings)
    print(f"{len(prompts)} images in {output_dir}; contact sheet: {sheet}")


def read_prompts(config: SampleConfig) -> list[str]:
    """Arguments, then the file's lines; standard input for `-`, or if piped and nothing else is given."""
    given = config.prompts
    if not given and config.prompts_file is None and not sys.stdin.isatty():
        given = ("-",)
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


def open_pipeline(
    path: str, device: str, dtype: str = "float32", scheduler: str = DEFAULT_SCHEDULER, disable_tqdm: bool = False
) -> UViTPipeline:
    """The pipeline of a folder, on its device, with the scheduler asked for. Raises UserError where there is none."""
    folder = Path(path).expanduser()
    if not (folder / "model_index.json").is_file():
        problem = (
            "has no model_index.json, so it is no pipeline folder" if folder.is_dir() else "there is no such folder"
        )
        raise UserError(f"--pipeline {path}: {problem}; give OUTPUT_DIR/pipeline of a finished training run")
    with quiet():
        pipeline = UViTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(pick_device(device))
    pipeline.scheduler = build_scheduler(scheduler)
    pipeline.set_progress_bar_config(desc="denoising", leave=False, disable=disable_tqdm)
    return pipeline


def metadata(config: SampleConfig) -> dict[str, str]:
    """What made the picture, under the flags' names; its prompt and seed come on top."""
    names = ("pipeline", "guidance_scale", "num_inference_steps", "scheduler", "negative_prompt", "dtype")
    values = asdict(config)
    return {"software": f"uvit {__version__}"} | {name: str(values[name]) for name in names if values[name] is not None}


def next_number(folder: Path) -> int:
    """One more than the highest number that a picture in the folder begins with, so none is overwritten."""
    matches = [re.match(r"(\d{5,})-", path.name) for path in folder.glob("*.png")]
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def file_name(number: int, prompt: str) -> str:
    """00000-the-prompt.png; letters of any script stay."""
    slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50].rstrip("-")
    return f"{number:05d}-{slug or 'empty'}.png"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
