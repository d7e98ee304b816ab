"""Flags of `uvit bench`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from uvit.config.bounds import Bounds, PositiveInt, check_bounds
from uvit.config.paths import PathFlag, expand_paths


@dataclass(frozen=True)
class BenchConfig:
    """Time the training step, the forward pass and the data loader of a U-ViT, on random features.

    Each figure is a median, and is compared with the speed of a large matrix product (matmul) measured just before and
    after, so that it is valid on a shared machine too.

    uvit bench --uvit_config_file uvit_t2i_small --batch_size 32 --precision bf16
    """

    # Most used
    uvit_config_file: PathFlag = "uvit_t2i_small"
    """The model: the name of a model preset, or a JSON file."""
    latents: Literal["vae", "none"] = "vae"
    """What the random features are. vae: moments of latents; none: pixels, for a model with 3 in_channels."""
    batch_size: Annotated[int, Bounds(least=0, most=1_000_000)] = 0
    """Samples per training step and per forward pass. 0: 4 on a CPU; 256 on a GPU, where a small batch would time
    launches only."""
    steps: PositiveInt = 5
    """Forward passes and training steps to measure, after two of each to warm up."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or automatic mixed precision over float32 weights. The matrix product uses the same type."""

    # What is timed
    compile: bool = False
    """Time the compiled model (torch.compile). Compilation comes first and is not counted."""
    recompute: bool = False
    """Recompute activations in the backward pass. This counts as time, but not as useful work."""
    loader: bool = False
    """Also time the data loader, on 1,024 pairs in a temporary folder (137 MB for the presets)."""

    # Machine
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    num_threads: Annotated[int, Bounds(least=0, most=1024, hint="0 leaves the choice to PyTorch")] = 0
    """CPU threads; 0: PyTorch's choice. Use 1 to measure one core."""
    matmul_size: Annotated[int, Bounds(least=0, most=65_536)] = 0
    """Rows and columns of the matrices in the matrix product. 0: 2048 on a CPU, 8192 on a GPU."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
