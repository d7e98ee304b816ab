"""The roofline of a training step: for each kind of kernel its work, its bytes and the least time that a GPU needs.

    python benchmarks/roofline.py [--uvit_config_file uvit_t2i_small] [--batch_size 256] [--gpu H100] [--kernels]
    python benchmarks/roofline.py --coco [--gpu H100 A100 4090]     # the steps of runs/coco.sh: hours and cost

Nothing is measured. The step is traced from shapes: each operation reads its inputs from memory and writes its outputs,
as PyTorch does without a compiler. The least time of a kernel is its work at the card's peak or its bytes at its
bandwidth, whichever is longer. Real kernels are slower. `expected` assumes shares of the peaks that are usual
(EFFICIENCY), and that a compiler leaves FUSED of the bytes between matrix products and attention.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from uvit.config.model import resolve_model_config
from uvit.model import Attention
from uvit.modern_model import ModernAttention
from uvit.train.memory import layer_norms_in_float32
from uvit.train.profiling import count_flops, meta_inputs, meta_unet


@dataclass(frozen=True)
class Card:
    """Dense FLOP/s and bytes/s of the data sheet, and a price that is assumed."""

    half: float  # bfloat16 matrix products
    tf32: float  # float32 ones in TF32
    memory: float
    dollars: float  # an hour


CARDS = {
    "H100": Card(989e12, 495e12, 3.35e12, 2.50),  # SXM
    "A100": Card(312e12, 156e12, 2.04e12, 1.30),  # 80 GB, SXM
    "4090": Card(165.2e12, 82.6e12, 1.01e12, 0.40),
}
EFFICIENCY = {"matrix products": 0.66, "attention": 0.35, "memory": 0.9}
FUSED = 0.6
KINDS = {  # a kind of kernel: how the names of its operations begin
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_flash_attention"),
    "patch and final convolutions": ("convolution",),
    "layer norms": ("native_layer_norm",),
    "GELU": ("gelu",),
    "casts and copies": ("_to_copy", "copy_", "clone", "stack", "slice_backward"),
    "skips joined": ("cat",),
    "sums for biases": ("sum",),
    "residual sums": ("add", "add_"),
}
VIEWS = (  # operations that move no bytes
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
    "alias", "unbind", "split", "split_with_sizes", "as_strided", "empty", "empty_like", "empty_strided",
    "_reshape_alias", "reshape", "lift_fresh", "unflatten",
)  # fmt: skip


@dataclass
class Kernel:
    launches: int = 0
    num_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


class KernelCounter(TorchDispatchMode):
    """Counts bytes and work of every operation."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card
        self.kernels: dict[str, Kernel] = defaultdict(Kernel)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in VIEWS and not func._schema.name.startswith("prim::"):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
            self.add(name, num_bytes, flops_of(name, inputs, outputs))
        return result

    def add(self, name: str, num_bytes: int, flops: int, launches: int = 1) -> None:
        kernel = self.kernels[name]
        kernel.launches += launches
        kernel.num_bytes += num_bytes
        kernel.flops += flops
        kernel.seconds += max(flops / self.card.half, num_bytes / self.card.memory)


def flops_of(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of matrix products and attention; what else there is takes as long as its bytes."""
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = inputs[-2:]
        return 2 * left.numel() * right.shape[-1]
    if name.startswith("_scaled_dot_product"):
        tensors = [tensor for tensor in inputs if tensor.ndim == 4]
        is_backward = "backward" in name
        q, k = tensors[1:3] if is_backward else tensors[:2]  # the backward's first is the gradient of the output
        forward = 4 * q.numel() * k.shape[2]
        return forward * 5 // 2 if is_backward else forward  # it computes the weights again
    return 0


def trace(model: str, batch_size: int, card: Card) -> dict[str, Kernel]:
    """The kernels of a step: forward, backward, AdamW and EMA, under bf16 autocast."""
    unet = meta_unet(resolve_model_config(model)).train()
    for module in unet.modules():
        if isinstance(module, Attention | ModernAttention):
            module.fused = True
    layer_norms_in_float32(unet)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        latents, timesteps, context = meta_inputs(unet, batch_size, None)
        with KernelCounter(card) as counter:
            with torch.autocast("cpu", torch.bfloat16):
                loss = unet(latents, timesteps, context).float().square().mean()
            loss.backward()
    num = sum(parameter.numel() for parameter in unet.parameters())
    counter.add("AdamW, EMA, gradient norm", 44 * num, 0, launches=6)  # bytes: docs/benchmarks.md
    return counter.kernels


def by_kind(kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    found: dict[str, Kernel] = defaultdict(Kernel)
    for name, kernel in kernels.items():
        kind = next((kind for kind, starts in KINDS.items() if name in starts or name.startswith(long(starts))), None)
        kind = kind or (name if "AdamW" in name else "other")
        total = found[kind]
        total.launches += kernel.launches
        total.num_bytes += kernel.num_bytes
        total.flops += kernel.flops
        total.seconds += kernel.seconds
    return found


def long(starts: tuple[str, ...]) -> tuple[str, ...]:
    """Names that only begin so: not those of two or three letters, which begin many."""
    return tuple(start for start in starts if len(start) >= 4)


def expected_seconds(kinds: dict[str, Kernel], card: Card, compiled: bool) -> float:
    """With the usual shares of the peaks."""
    seconds = 0.0
    for kind, kernel in kinds.items():
        moving = kernel.num_bytes / card.memory / EFFICIENCY["memory"]
        if kind in EFFICIENCY:
            seconds += max(kernel.flops / card.half / EFFICIENCY[kind], moving)
        else:
            seconds += moving * (FUSED if compiled and "AdamW" not in kind else 1)
    return seconds


def table(model: str, batch_size: int, name: str, all_kernels: bool) -> str:
    kernels = trace(model, batch_size, CARDS[name])
    kinds = by_kind(kernels)
    total = sum(kernel.seconds for kernel in kinds.values())
    lines = [f"{model}, batch {batch_size}, bf16, {name}\n"]
    lines += ["| kernels | launches | GB | TFLOP | FLOP/byte | ms | share |", "|---|---:|---:|---:|---:|---:|---:|"]
    shown = kernels if all_kernels else kinds
    for kind, kernel in sorted(shown.items(), key=lambda item: -item[1].seconds):
        lines.append(
            f"| {kind} | {kernel.launches} | {kernel.num_bytes / 1e9:.1f} | {kernel.flops / 1e12:.2f} "
            f"| {kernel.flops / max(1, kernel.num_bytes):.0f} | {1000 * kernel.seconds:.2f} "
            f"| {kernel.seconds / total:.1%} |"
        )
    _, flops = count_flops(resolve_model_config(model))
    lines.append("")
    card = CARDS[name]
    for what, seconds in (
        ("the sum, a bound", total),
        ("expected, eager", expected_seconds(kinds, card, compiled=False)),
        ("expected, compiled", expected_seconds(kinds, card, compiled=True)),
    ):
        rate = batch_size / seconds
        lines.append(
            f"{what}: {1000 * seconds:.1f} ms a step, {rate:,.0f} images/s, {flops * rate / card.half:.0%} MFU; "
            f"a million steps of 256 in {256e6 / rate / 3600:.0f} hours"
        )
    return "\n".join(lines)


# The steps of runs/coco.sh

TRAIN_IMAGES, HELD_OUT_IMAGES, VAL_IMAGES, PROMPTS, CAPTIONS = 82_783, 1024, 40_504, 30_000, 5
EVALUATIONS = 50 * 2  # of the U-ViT for an image, with guidance
DOWNLOAD = 20.4e9 / 50e6  # seconds, at 50 MB/s
DECODED = 2000  # photographs a second: some 16 cores
ENCODERS_SHARE = 0.3  # of the TF32 peak, in convolutions and small matrices; assumed


def flops_of_network(network: nn.Module, *inputs: Any, **named: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs, **named)
    return counter.get_total_flops()


def network_flops() -> dict[str, int]:
    """Of one image or caption: encoder and decoder of Stable Diffusion's VAE at 256 pixels, and CLIP ViT-L/14."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    levels = [128, 256, 512, 512]
    with torch.device("meta"):
        vae: Any = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=levels, layers_per_block=2, latent_channels=4,
        )  # fmt: skip
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes))
        image, latents = torch.empty(1, 3, 256, 256), torch.empty(1, 4, 32, 32)
        token_ids = torch.zeros(1, 77, dtype=torch.int64)
        return {
            "encoder": flops_of_network(vae.encoder, image),
            "decoder": flops_of_network(vae.decoder, latents),
            "text": flops_of_network(clip, input_ids=token_ids),
        }


def coco_table(model: str, names: list[str]) -> str:
    """Hours and dollars of each step, on one card."""
    flops = network_flops()
    forward, _ = count_flops(resolve_model_config(model))
    print({name: f"{number / 1e9:,.0f} GFLOP" for name, number in (flops | {"U-ViT": forward}).items()}, "\n")
    lines = [f"| {model}, one card | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    rows: dict[str, list[float]] = defaultdict(list)
    for name in names:
        card = CARDS[name]
        encode = card.tf32 * ENCODERS_SHARE
        rows["download and unpack"].append(2 * DOWNLOAD)
        pairs = TRAIN_IMAGES + HELD_OUT_IMAGES
        work = pairs * (flops["encoder"] + CAPTIONS * flops["text"])
        rows["extract"].append(max(work / encode, pairs / DECODED))
        kinds = by_kind(trace(model, 256, card))
        rows["train, a million steps of 256"].append(1e6 * expected_seconds(kinds, card, compiled=True))
        work = PROMPTS * (EVALUATIONS * forward + flops["decoder"])
        rows["sample 30,000 images, evaluate"].append(work / encode + (VAL_IMAGES + PROMPTS) / DECODED)
    for step, seconds in rows.items():
        lines.append(f"| {step} | {' | '.join(f'{value / 3600:.1f} h' for value in seconds)} |")
    hours = [sum(column) / 3600 for column in zip(*rows.values(), strict=True)]
    costs = [f"${CARDS[name].dollars * value:,.0f}" for name, value in zip(names, hours, strict=True)]
    lines.append(
        f"| all, at {', '.join(f'${CARDS[name].dollars:.2f}' for name in names)} an hour | {' | '.join(costs)} |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvit_config_file", nargs="+", default=["uvit_t2i_small"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--gpu", nargs="+", choices=list(CARDS), default=["H100"])
    parser.add_argument("--coco", action="store_true", help="the steps of runs/coco.sh")
    parser.add_argument("--kernels", action="store_true", help="every operation, not kinds of them")
    options = parser.parse_args()
    for model in options.uvit_config_file:
        if options.coco:
            print(coco_table(model, options.gpu), end="\n\n", flush=True)
            continue
        for gpu in options.gpu:
            print(table(model, options.batch_size, gpu, options.kernels), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
