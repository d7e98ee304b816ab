"""`uvit bench`: its flags."""

from dataclasses import dataclass
from typing import Literal

from uvit.errors import UserError


@dataclass(frozen=True)
class BenchConfig:
    """Time the training step, the forward pass and the loader of a U-ViT, on random features.

    Beside each stands the machine's own rate for a large matrix product, taken just before and after it, so
    that a machine that others use too is compared with itself at that moment. Figures are medians.
    """

    uvit_config_file: str = "uvit_t2i_small"
    """Name of a shipped model config, or a JSON path."""
    batch_size: int = 4
    """Samples in a training step and in a forward pass."""
    steps: int = 5
    """Forward passes and training steps to measure, after two of each to warm up."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or automatic mixed precision over fp32 weights. The matrix product is taken in the same type."""
    compile: bool = False
    """Time the compiled model (torch.compile); compiling comes before the first round and is not counted."""
    recompute: bool = False
    """Recompute activations in the backward pass; the recomputation is time, and not counted as work."""
    loader: bool = False
    """Also time the loader on 1,024 pairs in a temporary folder (137 MB at the shipped configs' sizes)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""
    num_threads: int = 0
    """CPU threads; 0 takes PyTorch's choice. 1 measures one core."""
    matmul_size: int = 2048
    """Rows and columns of the square matrices whose product is the yardstick (GPUs want 8192)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "matmul_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.num_threads < 0:
            raise UserError(f"--num_threads {self.num_threads}: must be 0 (PyTorch's choice) or more")
