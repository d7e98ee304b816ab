"""How much of the hardware a run makes use of: model FLOPs utilisation (Chowdhery et al. 2022, appendix B).

The FLOPs of the U-ViT's forward and backward passes, and not those of recomputing, over the FLOPs that the hardware
could do in the same time. A text encoder's work is not counted.
"""

import functools
import re
import time
from dataclasses import dataclass

import torch

from uvit.cost import count_flops
from uvit.train.setup import Run, model_config

# FLOP/s of dense matrix products, from the makers' data sheets: words of the GPU's name, 16 bits, float32.
PEAKS = (
    ("B200", 2250e12, 75e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)
SIDE, SECONDS = 512, 0.1  # of the matrix products that a CPU is measured with


@dataclass(frozen=True)
class Work:
    """Of one optimizer step, over all processes."""

    flops: int
    peak: float | None  # FLOP/s; None: not known
    sentence: str  # what the utilisation is relative to

    def utilisation(self, seconds: float) -> float | None:
        """A share of 1, of a step that takes so long."""
        return None if self.peak is None else self.flops / (seconds * self.peak)


def work_of(run: Run) -> Work:
    _, height, width = run.features.moments_shape
    _, flops = count_flops(model_config(run.networks["unet"]), size=(height, width))
    dtype, device = run.precision.dtype, run.device
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = known_peak(name, dtype)
        source = f"the data sheet of {name} for {kind}"
    else:
        peak = max(measured_peak(dtype), measured_peak(torch.float32))  # half precision may be the slower one here
        kinds = kind if dtype == torch.float32 else f"{kind} or float32"
        source = f"measured just now: {kinds} matrix products on this CPU"
    if peak is None:
        return Work(flops * run.samples_per_step, None, f"no utilisation (MFU): the peak of {name} is not known here")
    sentence = f"utilisation (MFU) is relative to {peak / 1e9:,.0f} GFLOP/s a process, {source}"
    return Work(flops * run.samples_per_step, peak * run.world.size, sentence)


def known_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU by its name, such as `NVIDIA H100 80GB HBM3`."""
    words = set(re.split(r"[\s-]+", name))
    for part, half, single in PEAKS:
        if set(part.split()) <= words and "Laptop" not in words:
            return single if dtype == torch.float32 else half
    return None


@functools.cache
def measured_peak(dtype: torch.dtype) -> float:
    """The best of some matrix products on the CPU, with the threads that there are; takes a tenth of a second."""
    left, right = (torch.ones(SIDE, SIDE).to(dtype) for _ in range(2))
    product = left @ right
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        torch.mm(left, right, out=product)
        best = min(best, time.perf_counter() - before)
    return 2 * SIDE**3 / best
