"""Flags of `uvit sample` and `uvit evaluate`."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from uvit.config.sharding import parse_shard
from uvit.errors import UserError

SPEEDS = {"fast": 8, "balanced": 12, "quality": 24}  # steps of solvers that are fitted to the model


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from prompts: PNG files with prompt and settings in their metadata, and a contact sheet.

    Without any prompt, on a terminal, it asks for one after another.
    """

    pipeline: str
    """The pipeline folder, as training leaves it in OUTPUT_DIR/pipeline or `uvit convert` writes it; or a finished
    training run's OUTPUT_DIR itself."""
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
    guidance_scale: tuple[float, ...] = (7.5,)
    """How much more the prompt counts than no prompt; 1 is no guidance, at half the cost. Several scales are drawn
    side by side, each in a folder of its own."""
    guidance_interval: tuple[float, float] = (1, 1000)
    """Noise levels with guidance, lowest and highest, of 1 to 1000; elsewhere the prompt counts once, at half the cost.
    Above guidance 4 try `100 1000`: what much guidance spoils, it spoils at little noise."""
    compare_with: tuple[str, ...] = ()
    """More pipelines, which draw the same from the same seeds, side by side with --pipeline."""
    num_inference_steps: int = 50
    """Steps from noise to picture; with the default scheduler 15 to 25 often do."""
    scheduler: Literal["dpmsolver++", "ddim", "unipc", "euler", "heun", "ddpm", "official", "fitted"] = "dpmsolver++"
    """The solver. heun calls the network twice a step; ddpm adds noise at each and wants many; official is that of
    U-ViT's published results; fitted is what --fit_schedule left with the model."""
    speed: Literal["fast", "balanced", "quality"] | None = None
    """8, 12 or 24 steps of the fitted solver, instead of --scheduler and --num_inference_steps."""
    fit_schedule: bool = False
    """Draw nothing: fit the solvers of --speed to the model, for each --guidance_scale, on these prompts (8 pictures at
    least; 16 or more are better), and store them with the pipeline. Takes as long as drawing them in 350 steps."""
    negative_prompt: str | None = None
    """What to stay away from, instead of the empty prompt."""
    init_image: str | None = None
    """An image file to begin with instead of noise alone; its middle square is taken, as for training."""
    strength: float | None = None
    """How much of --init_image may change, above 0 to 1: the share of the steps that are done. Default: 0.8; with a
    mask, 1."""
    mask: str | None = None
    """An image file of the size of --init_image: what is white in it is repainted, the rest stays to the pixel."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the networks."""
    enable_vae_slicing: bool = False
    """Decode one image of a batch at a time, for less memory."""
    enable_vae_tiling: bool = False
    """Decode images in tiles where they are larger than those that the VAE was trained on, for less memory."""
    enable_model_cpu_offload: bool = False
    """Hold only that one of the networks on the GPU which is at work, for less memory."""
    shard: str | None = None
    """I/N: draw only part I, from 0, of N, beside other processes or machines that draw theirs; torchrun sets it."""
    skip_existing: bool = False
    """Go on with an interrupted run: number from 0, and leave out what is there already from the same settings."""
    save_latents: Literal["npy", "safetensors"] | None = None
    """Also write what the VAE decoded, (4, h, w) float32, scaled as in training, beside each picture."""
    grid: bool = True
    """Write contact_sheet.png, of at most 400 pictures."""
    columns: int | None = None
    """Columns of the contact sheet; by default what is drawn side by side or a prompt's several images make a row;
    else a square."""
    disable_tqdm: bool = False
    """Show no progress bars."""

    def __post_init__(self) -> None:
        for name in ("num_images_per_prompt", "batch_size", "columns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        if not 1 <= self.num_inference_steps <= 1000:
            raise UserError(f"--num_inference_steps {self.num_inference_steps}: must be in 1..1000")
        if not self.guidance_scale:
            raise UserError("--guidance_scale: needs a value; 1 is no guidance")
        for scale in self.guidance_scale:
            if not (math.isfinite(scale) and scale >= 0):
                raise UserError(f"--guidance_scale {scale}: must be a number of at least 0; 1 is no guidance")
        lowest, highest = self.guidance_interval
        if not 1 <= lowest <= highest <= 1000:
            raise UserError(
                f"--guidance_interval {lowest:g} {highest:g}: must be two labels of 1 to 1000, the lower first"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be in 0..2^63-1")
        if self.speed is not None and (self.scheduler, self.num_inference_steps) != ("dpmsolver++", 50):
            raise UserError(f"--speed {self.speed}: chooses --scheduler and --num_inference_steps; leave these out")
        if self.init_image is not None and (self.speed is not None or self.scheduler == "fitted"):
            raise UserError(
                f"--init_image {self.init_image}: the fitted solver begins with noise alone; choose another"
            )
        if not is_text(self.negative_prompt or ""):
            raise UserError(f"--negative_prompt {self.negative_prompt!r}: is not UTF-8 text")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.init_image is None:
                raise UserError(f"--{name} {getattr(self, name)}: needs an --init_image, which it is about")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"--strength {self.strength}: must be above 0 and at most 1")
        if self.strength is not None and self.strength * self.num_inference_steps < 1:
            raise UserError(
                f"--strength {self.strength}: of --num_inference_steps {self.num_inference_steps} is less than one"
            )
        if self.columns is not None and not self.grid:
            raise UserError(f"--columns {self.columns}: --grid False asks for no contact sheet")
        parse_shard(self.shard)

    def resolved(self) -> "SampleConfig":
        """With what --speed stands for."""
        if self.speed is None:
            return self
        return replace(self, speed=None, scheduler="fitted", num_inference_steps=SPEEDS[self.speed])


@dataclass(frozen=True)
class EvaluateConfig:
    """Ask a model trained on the built-in shapes for combinations that it never saw, and read back what it drew."""

    pipeline: str
    """The pipeline folder."""
    output_dir: str
    """Where the contact sheet and results.json go."""
    split: str = "heldout"
    """heldout: combinations never trained on; train: those it was trained on."""
    max_prompts: int | None = None
    """Ask for only so many; without it for all, in each of the four wordings."""
    guidance_scale: float = 2.0
    """Guidance."""
    num_inference_steps: int = 25
    """Sampling steps."""
    batch_size: int = 72
    """Images drawn at a time."""
    seed: int = 0
    """Seed of the first image; the others' follow."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if self.split not in ("train", "heldout"):
            raise UserError(f"--split {self.split}: must be train or heldout")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise UserError(f"--max_prompts {self.max_prompts}: must be at least 1")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


def is_text(words: str) -> bool:
    """Whether this came as UTF-8: bytes that are none come from a terminal or a pipe as halves of surrogate pairs."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True
