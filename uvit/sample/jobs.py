"""What `uvit sample` generates: the image jobs, the variants of each, and the batches of this process.

An `ImageJob` is a prompt, a seed and a number. A `Variant` is a pipeline and a guidance scale. Every job runs in every
variant.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from uvit.config.sample import SampleConfig, is_text
from uvit.errors import UserError
from uvit.sample.load import find_pipeline


@dataclass(frozen=True)
class ImageJob:
    """One image to generate, with the same prompt and seed in all variants."""

    number: int
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        """00000-the-prompt.png. Letters of any script are kept."""
        slug = re.sub(r"[\W_]+", "-", self.prompt.lower()).strip("-")[:50].rstrip("-")
        return f"{self.number:05d}-{slug or 'empty'}.png"


@dataclass(frozen=True)
class Variant:
    """A pipeline and a guidance scale, with the folder for their images."""

    pipeline: Path
    guidance_scale: float
    name: str  # for headings; empty if there is only one variant
    folder: Path


def list_variants(config: SampleConfig) -> list[Variant]:
    """Every pipeline with every guidance scale, pipeline by pipeline. Raises UserError."""
    folders = [find_pipeline(config.pipeline), *(find_pipeline(path, "compare_with") for path in config.compare_with)]
    names, scales = short_names(folders), list({f"{scale:g}": scale for scale in config.guidance_scale}.values())
    variants = []
    for (folder, name), scale in product(zip(folders, names, strict=True), scales):
        words = [name] if len(folders) > 1 else []
        words += [f"guidance {scale:g}"] if len(scales) > 1 else []
        slug = re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-")
        variants.append(Variant(folder, scale, " ".join(words), Path(config.output_dir) / slug))
    if len({variant.folder for variant in variants}) < len(variants):
        paths = " ".join(config.compare_with)
        raise UserError(f"--compare_with {paths}: two pipelines cannot be distinguished by name; rename a folder")
    return variants


def short_names(folders: Sequence[Path]) -> list[str]:
    """The parts of each path that the paths do not share."""
    paths = [list(folder.resolve().parts) for folder in folders]
    for end in (0, -1):
        while all(paths) and len({parts[end] for parts in paths}) == 1:
            for parts in paths:
                parts.pop(end)
    return ["-".join(parts) for parts in paths]


def image_jobs(config: SampleConfig, prompts: Sequence[str], first: int) -> list[ImageJob]:
    """Number the images from `first`. The images of a prompt are consecutive; each seed is one more than the last.

    Raises UserError for a prompt that is not UTF-8 text.
    """
    for prompt in prompts:
        if not is_text(prompt):
            raise UserError(f"the prompt {prompt!r}: is not UTF-8 text; save the file or type the prompt in UTF-8")
    repeated = [prompt for prompt in prompts for _ in range(config.num_images_per_prompt)]
    return [ImageJob(first + i, prompt, config.seed + i) for i, prompt in enumerate(repeated)]


def job_batches(jobs: Sequence[ImageJob], batch_size: int, part: int, num_parts: int) -> list[Sequence[ImageJob]]:
    """The batches of one part. All parts share one division into batches: rounding depends on the size of the batch."""
    starts = range(0, len(jobs), batch_size)
    return [jobs[start : start + batch_size] for start in starts][part::num_parts]
