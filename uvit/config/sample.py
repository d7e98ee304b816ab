"""Flags of `uvit sample`."""

import math
from dataclasses import dataclass
from typing import Literal

from uvit.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from prompts: PNG files with prompt and settings in their metadata, and a contact sheet."""

    pipeline: str
    """The pipeline folder: what training leaves in OUTPUT_DIR/pipeline, or `uvit convert` writes."""
    prompts: tuple[str, ...] = ()
    """What to draw, each in quotes; `-`, or a pipe by itself, reads standard input, one a line."""
    prompts_file: str | None = None
    """A text file with one prompt a line, after those named above."""
    output_dir: str = "samples"
    """Where the pictures go; new ones are numbered on from those that are there."""
    seed: int = 0
    """Seed of the first image; the next has the next seed. The batch plays no part."""
    num_images_per_prompt: int = 1
    """Images of each prompt."""
    batch_size: int = 8
    """Images drawn at a time; changes speed and memory, not the pictures."""
    guidance_scale: float = 7.5
    """How much more the prompt counts than no prompt; 1 is no guidance, at half the cost."""
    num_inference_steps: int = 50
    """Steps from noise to picture; with the default scheduler 15 to 25 often do."""
    scheduler: Literal["dpmsolver++", "ddim", "unipc", "euler", "heun", "ddpm"] = "dpmsolver++"
    """The solver. heun calls the network twice a step; ddpm adds noise at each and wants many."""
    negative_prompt: str | None = None
    """What to stay away from, instead of the empty prompt."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the networks."""
    columns: int | None = None
    """Columns of the contact sheet; by default a prompt's several images make a row; else a square."""
    disable_tqdm: bool = False
    """Show no progress bars."""

    def __post_init__(self) -> None:
        for name in ("num_images_per_prompt", "batch_size", "columns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        if not 1 <= self.num_inference_steps <= 1000:
            raise UserError(f"--num_inference_steps {self.num_inference_steps}: must be in 1..1000")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UserError(f"--guidance_scale {self.guidance_scale}: must be a number of at least 0; 1 is no guidance")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be in 0..2^63-1")
