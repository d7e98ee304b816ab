"""`uvit autoencoder`."""

from dataclasses import dataclass
from typing import Literal

from uvit.errors import UserError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Train a first stage, an AutoencoderKL, on the images of a source."""

    source: tuple[str, ...]
    """The images: shapes, shapes:two, a .tar, a COCO folder or captions file, a folder with metadata.jsonl."""
    output_dir: str
    """The folder to write: opens with diffusers' AutoencoderKL and as --vae_name_or_path."""
    split: str = "train"
    """Which split of the source."""
    image_folder: tuple[str, ...] = ()
    """The images of a COCO captions file."""
    resolution: int = 64
    """Side of the square images, in pixels."""
    factor: Literal[4, 8] = 8
    """How many times smaller than the image the latents are, a side."""
    channels: int = 32
    """Width of the first level; the deeper ones have twice that."""
    layers_per_block: int = 1
    """Residual layers a level."""
    latent_channels: int = 4
    """Channels of the latents; the U-ViT's in_channels."""
    max_steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it warms up over 100 steps and falls to zero as a cosine."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence, mean over latents, beside the squared error, mean over pixels."""
    ema_decay: float = 0.995
    """Decay of the averaged weights, which are what is written."""
    preview_steps: int = 1000
    """Steps between pictures of reconstructions, in OUTPUT_DIR/previews; -1: only at the end."""
    num_workers: int = 0
    """Processes that decode images."""
    seed: int = 1234
    """Seed of the weights, the batches and the posterior draws."""
    bf16: bool = False
    """Compute in bfloat16 over float32 weights; faster on GPUs, and on CPUs with instructions for it."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    overwrite_output_dir: bool = False
    """Write into an OUTPUT_DIR that holds an autoencoder already; the old one is kept under another name."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if self.resolution % self.factor:
            raise UserError(f"--resolution {self.resolution}: must be a multiple of --factor {self.factor}")
        for name in ("max_steps", "batch_size", "channels", "layers_per_block", "latent_channels", "resolution"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.channels % 8:
            raise UserError(f"--channels {self.channels}: must be a multiple of 8, for group normalisation")
