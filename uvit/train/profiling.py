"""FLOPs of a U-ViT, and a run's model FLOPs utilisation (MFU; Chowdhery et al. 2022, appendix B).

MFU is the FLOPs of the U-ViT's forward and backward passes, divided by those that the hardware could do in the same
time. Recomputed activations and the text encoder do not count.
"""

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from uvit.device import measured_peak
from uvit.model import UViTT2IModel, blocks_in_order
from uvit.train.setup import Run
from uvit.weights.unet import model_config, new_unet

# FLOP/s of dense matrix products, from the vendors' data sheets: (words of the GPU's name, 16 bits summed in float32,
# float32). The first row whose words are all in the name counts. TF32 has half the rate of 16 bits on all of them.
PEAKS = (
    ("GB300", 2500e12, 80e12),
    ("GB200", 2500e12, 80e12),
    ("B300", 2250e12, 75e12),
    ("B200", 2250e12, 75e12),
    ("GH200", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("H800 PCIe", 756e12, 51e12),
    ("H800", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L20", 119.5e12, 59.8e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 5080", 112.6e12, 56.3e12),
    ("RTX 5070 Ti", 87.9e12, 43.9e12),
    ("RTX 5070", 61.7e12, 30.9e12),
    ("RTX 5060 Ti", 47.4e12, 23.7e12),
    ("RTX 5060", 38.4e12, 19.2e12),
    ("RTX 4090 D", 147.1e12, 73.5e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)
SLOWER = {"Laptop", "D"}  # words of a GPU that is slower than the one with the rest of its name


@dataclass(frozen=True)
class MfuReference:
    """What the MFU of an optimizer step, over all processes, is relative to."""

    flops: int
    peak: float | None  # FLOP/s; None: unknown
    sentence: str  # for the console

    def utilisation(self, seconds: float) -> float | None:
        """The MFU, 0..1, of a step that takes this many seconds."""
        return None if self.peak is None else self.flops / (seconds * self.peak)


def mfu_reference(run: Run) -> MfuReference:
    _, height, width = run.features.latents_shape
    _, flops = count_flops(model_config(run.master_model["unet"]), size=(height, width))
    dtype, device = run.precision.dtype, run.device
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        uses_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        peak = known_peak(name, dtype, uses_tf32)
        source = f"the data sheet of {name} for {'TF32' if uses_tf32 else kind}"
    else:
        peak = max(measured_peak(dtype), measured_peak(torch.float32))  # on a CPU, half precision may be slower
        kinds = kind if dtype == torch.float32 else f"{kind} or float32"
        source = f"measured just now: {kinds} matrix products on this CPU"
    if peak is None:
        return MfuReference(
            flops * run.samples_per_step, None, f"no utilisation (MFU): the peak FLOP/s of {name} is unknown"
        )
    sentence = f"utilisation (MFU) is relative to {peak / 1e9:,.0f} GFLOP/s per process, {source}"
    return MfuReference(flops * run.samples_per_step, peak * run.world.size, sentence)


def known_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """FLOP/s of a GPU by its name, such as `NVIDIA H100 80GB HBM3`; None: unknown. `tf32`: of float32 products."""
    words = set(re.split(r"[\s-]+", name))
    for part, half, single in PEAKS:
        if (named := set(part.split())) <= words and words & SLOWER == named & SLOWER:
            return half if dtype != torch.float32 else half / 2 if tf32 else single
    return None


# FLOPs, counted on the meta device


def meta_unet(model_config: dict[str, Any], tp: int = 1) -> UViTT2IModel:
    """A U-ViT that has shapes and no content. `tp`: as one of so many tensor parallel processes holds it."""
    with torch.device("meta"):
        unet = new_unet(model_config).train()
        for block in blocks_in_order(unet) if tp > 1 else []:
            attention, mlp = block.attn, block.mlp
            dim, (wide, hidden) = mlp.fc1.in_features, (mlp.fc1.out_features, mlp.fc2.in_features)
            attention.qkv = nn.Linear(dim, 3 * dim // tp, bias=attention.qkv.bias is not None)
            attention.proj = nn.Linear(dim // tp, dim)
            mlp.fc1 = nn.Linear(dim, wide // tp, bias=mlp.fc1.bias is not None)
            mlp.fc2 = nn.Linear(hidden // tp, dim)
    return unet


def count_flops(
    model_config: dict[str, Any], batch_size: int = 1, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """FLOPs of matrix products, convolutions and attention in (a forward pass, a forward and backward pass).

    A multiplication with its addition counts as 2. `size`: height and width of the latents. Default: the model's.
    """
    return _count_flops(json.dumps(model_config), batch_size, size)


@functools.cache
def _count_flops(model_json: str, batch_size: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """`count_flops`. It takes a second or more, and a command asks more than once."""
    unet = meta_unet(json.loads(model_json))  # there attention is plain matrix products, which the counter knows
    with torch.device("meta"):
        inputs = meta_inputs(unet, batch_size, size)
    with FlopCounterMode(display=False) as forward:
        prediction = unet(*inputs)
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def meta_inputs(unet: UViTT2IModel, batch_size: int, size: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, timesteps, context) on the device of the context that calls this."""
    sizes: Any = unet.config
    rows, columns = unet.grid
    height, width = size or (rows * unet.patch_size, columns * unet.patch_size)
    latents = torch.empty(batch_size, sizes.in_channels, height, width)
    context = torch.empty(batch_size, sizes.num_text_tokens, sizes.clip_dim)
    return latents, torch.ones(batch_size), context
