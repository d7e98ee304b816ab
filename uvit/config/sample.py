"""Flags of `uvit sample`."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from uvit.config.bounds import BatchSize, Bounds, Seed, check_bounds
from uvit.config.paths import PathFlag, expand_paths
from uvit.config.sharding import parse_shard
from uvit.errors import UserError

SPEEDS = {"fast": 8, "balanced": 12, "quality": 24}  # steps of solvers that are fitted to the model

NO_FIT = (  # flags of images, which --fit_schedule does not generate
    "compare_with", "init_image", "mask", "strength", "scheduler", "num_inference_steps", "speed", "shard",
    "save_latents", "skip_existing", "output_dir", "grid", "columns",
    "batch_size",
)  # fmt: skip

Guidance = Annotated[float, Bounds(least=0, most=1000, hint="1 turns guidance off")]
InferenceSteps = Annotated[int, Bounds(least=1, most=1000)]
Timestep = Annotated[float, Bounds(least=1, most=1000)]
Scheduler = Literal["dpmsolver++", "ddim", "unipc", "euler", "heun", "ddpm", "official", "fitted"]


@dataclass(frozen=True)
class SampleConfig:
    """Generate images from prompts: PNG files with prompt and settings in their metadata, and a contact sheet.

    Without a prompt, on a terminal, it asks for one after another.

    uvit sample "a red heart" --pipeline output/run/pipeline --guidance_scale 3
    """

    # Most used
    pipeline: PathFlag
    """The pipeline folder: OUTPUT_DIR/pipeline of a training run, a run's OUTPUT_DIR itself once it has finished, or a
    folder that `uvit convert` wrote."""
    prompts: tuple[str, ...] = ()
    """The prompts, each in quotes. `-` reads standard input, one prompt per line, as does a pipe without any prompt."""
    output_dir: PathFlag = "samples"
    """The folder for the images. Their numbers continue from the images that are already there."""
    num_images_per_prompt: Annotated[int, Bounds(least=1, most=1_000_000)] = 1
    """Images per prompt."""
    guidance_scale: tuple[Guidance, ...] = (7.5,)
    """Classifier-free guidance; 1 turns it off and halves the cost. Several values are sampled side by side, each in a
    folder of its own."""
    num_inference_steps: InferenceSteps = 50
    """Sampling steps. With the default scheduler 15 to 25 are often enough."""
    seed: Seed = 0
    """Seed of the first image; every further image adds 1. The batch size does not matter."""
    batch_size: BatchSize = 8
    """Images per batch. Affects speed and memory, not the images."""
    negative_prompt: str | None = None
    """Steer away from this text instead of the empty prompt."""
    speed: Literal["fast", "balanced", "quality"] | None = None
    """Use the fitted solver with 8, 12 or 24 steps, instead of --scheduler and --num_inference_steps. Run
    --fit_schedule once before."""

    # Prompts and output
    prompts_file: PathFlag | None = None
    """A text file with one prompt per line. They follow the prompts given above."""
    compare_with: tuple[PathFlag, ...] = ()
    """Further pipelines, sampled with the same prompts and seeds, side by side with --pipeline."""
    skip_existing: bool = False
    """Resume an interrupted run: number from 0, and skip images that exist already with the same settings."""
    save_latents: Literal["npy", "safetensors"] | None = None
    """Also save the latents of each image: (4, h, w), float32, scaled as in training."""
    grid: bool = True
    """Write contact_sheet.png, with 400 images at most."""
    columns: Annotated[int, Bounds(least=1, most=1000)] | None = None
    """Columns of the contact sheet. Default: one row for what is sampled side by side, or for the images of one prompt;
    otherwise a square."""

    # Solver and guidance
    scheduler: Scheduler = "dpmsolver++"
    """The solver. heun evaluates the network twice per step; ddpm adds noise at each step and needs many; official is
    the solver of U-ViT's published results; fitted is the one stored by --fit_schedule. A model of a linear path has
    dpmsolver++, unipc, euler, heun and fitted."""
    guidance_interval: tuple[Timestep, Timestep] = (1, 1000)
    """Apply guidance only at timesteps in this interval, lowest and highest, within 1..1000. Steps outside cost half.
    Above guidance 4 try `100 1000`: strong guidance does most harm at low noise."""
    fit_schedule: bool = False
    """Generate no images, but fit the solvers of --speed to the model, for each --guidance_scale, on these prompts (8
    images at least, better 16 or more), and store them in the pipeline. Takes as long as sampling with 350 steps."""

    # Editing an image
    init_image: PathFlag | None = None
    """Start from this image file instead of pure noise. It is center-cropped, as in training."""
    strength: Annotated[float, Bounds(above=0, most=1)] | None = None
    """How much of --init_image may change: the fraction of the steps that are run. Default: 0.8; 1 with --mask."""
    mask: PathFlag | None = None
    """An image file of the size of --init_image. White is repainted; the rest keeps its exact pixels."""

    # Device and memory
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the networks. auto: bfloat16 on a GPU that has it, float32 otherwise."""
    compile: bool = False
    """Compile the blocks of the U-ViT with torch.compile. On a GPU it takes about a minute, which thousands of images
    are worth."""
    enable_vae_slicing: bool = False
    """Decode the images of a batch one at a time. Saves memory."""
    enable_vae_tiling: bool = False
    """Decode images larger than the VAE's training size in tiles. Saves memory."""
    enable_model_cpu_offload: bool = False
    """Keep only the network that is running on the GPU. Saves memory."""
    shard: str | None = None
    """I/N: sample only part I (from 0) of N, while other processes or machines do the others. torchrun sets this
    itself."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        parse_shard(self.shard)
        if not self.guidance_scale:
            raise UserError("--guidance_scale: needs a value; 1 turns guidance off")
        lowest, highest = self.guidance_interval
        if lowest > highest:
            raise UserError(f"--guidance_interval {lowest:g} {highest:g}: must be two timesteps, the lower one first")
        if self.speed is not None and (self.scheduler, self.num_inference_steps) != ("dpmsolver++", 50):
            raise UserError(f"--speed {self.speed}: sets --scheduler and --num_inference_steps; leave these out")
        if self.init_image is not None and (self.speed is not None or self.scheduler == "fitted"):
            raise UserError(
                f"--init_image {self.init_image}: the fitted solver starts from pure noise; choose another --scheduler"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if self.fit_schedule and field.name in NO_FIT and value != field.default:
                words = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"--{field.name} {words}: --fit_schedule generates no images with it; leave it out")
        if not is_text(self.negative_prompt or ""):
            raise UserError(f"--negative_prompt {self.negative_prompt!r}: is not UTF-8 text")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.init_image is None:
                raise UserError(f"--{name} {getattr(self, name)}: needs an --init_image")
        if self.strength is not None and self.strength * self.num_inference_steps < 1:
            raise UserError(
                f"--strength {self.strength}: is less than one step of --num_inference_steps {self.num_inference_steps}"
            )
        if self.columns is not None and not self.grid:
            raise UserError(f"--columns {self.columns}: --grid False writes no contact sheet")

    def resolved(self) -> "SampleConfig":
        """With the scheduler and steps that --speed stands for."""
        if self.speed is None:
            return self
        return replace(self, speed=None, scheduler="fitted", num_inference_steps=SPEEDS[self.speed])


def is_text(words: str) -> bool:
    """Whether this is valid UTF-8: other bytes come from a terminal or a pipe as halves of surrogate pairs."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True
