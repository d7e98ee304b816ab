"""What `uvit sample` is to draw, and which of it here."""

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
    """The same in all variants."""

    number: int
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        """00000-the-prompt.png; letters of any script stay."""
        slug = re.sub(r"[\W_]+", "-", self.prompt.lower()).strip("-")[:50].rstrip("-")
        return f"{self.number:05d}-{slug or 'empty'}.png"


@dataclass(frozen=True)
class Variant:
    """One of the ways in which every picture is drawn."""

    pipeline: Path
    guidance_scale: float
    name: str  # for people; empty where there is one alone
    folder: Path


def list_variants(config: SampleConfig) -> list[Variant]:
    """All pipelines with all guidance scales; those of a pipeline follow one another. Raises UserError."""
    folders = [find_pipeline(config.pipeline), *(find_pipeline(path, "compare_with") for path in config.compare_with)]
    names, scales = short_names(folders), list(dict.fromkeys(config.guidance_scale))
    variants = []
    for (folder, name), scale in product(zip(folders, names, strict=True), scales):
        words = [name] if len(folders) > 1 else []
        words += [f"guidance {scale:g}"] if len(scales) > 1 else []
        slug = re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-")
        variants.append(Variant(folder, scale, " ".join(words), Path(config.output_dir) / slug))
    if len({variant.folder for variant in variants}) < len(variants):
        given = " ".join(config.compare_with)
        raise UserError(f"--compare_with {given}: cannot be told apart by name from one another or from --pipeline")
    return variants


def short_names(folders: Sequence[Path]) -> list[str]:
    """What the paths do not have in common."""
    rest = [list(folder.resolve().parts) for folder in folders]
    for end in (0, -1):
        while all(rest) and len({parts[end] for parts in rest}) == 1:
            for parts in rest:
                parts.pop(end)
    return ["-".join(parts) for parts in rest]


def image_jobs(config: SampleConfig, prompts: Sequence[str], first: int) -> list[ImageJob]:
    """Numbered from `first` on; a prompt's images follow one another, and each has the seed after the one before.

    Raises UserError for a prompt that came as bytes of no UTF-8.
    """
    for prompt in prompts:
        if not is_text(prompt):
            raise UserError(f"the prompt {prompt!r}: is not UTF-8 text; save or type it as that")
    repeated = [prompt for prompt in prompts for _ in range(config.num_images_per_prompt)]
    return [ImageJob(first + i, prompt, config.seed + i) for i, prompt in enumerate(repeated)]


def job_batches(pictures: Sequence[ImageJob], batch_size: int, part: int, num_parts: int) -> list[Sequence[ImageJob]]:
    """Those of a part. They are cut before they are shared out: a picture's last bits depend on its batch's size."""
    starts = range(0, len(pictures), batch_size)
    return [pictures[start : start + batch_size] for start in starts][part::num_parts]
