"""`uvit evaluate`."""

from dataclasses import dataclass

from uvit.errors import UserError


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
