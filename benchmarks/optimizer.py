"""What follows the backward pass of a step (gradient norm, clipping, AdamW, EMA), part by part, and designs compared.

    python benchmarks/optimizer.py [--model uvit_t2i_small] [--rounds 7]

CPU time of one thread, as the median of rounds in turns. Bytes are those that a part must read and write at least, for
each float32 parameter. The first line is the yardstick: an in-place multiplication, which does nothing but read and
write. `plain` updates as uvit did before: it multiplies by the clipping factor, 1 or not, at every step; `uvit` does
what train_step does, without clipping and with it; `cached` makes AdamW and EMA follow one another in blocks of 64 Ki
parameters, so that the EMA finds the weights in the cache.

With --muon: the step of uvit's Muon in bfloat16, which takes all matrices of one shape together and q, k and v apart,
against torch.optim.Muon, which takes one parameter after another and qkv as one matrix.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from uvit.config.model import resolve_model_config
from uvit.device import keep_freed_memory
from uvit.distributed.mesh import single_process_world
from uvit.distributed.ops import GradientNorm, clip_gradients, local_tensor
from uvit.model import UViTT2IModel
from uvit.train.ema import EMA
from uvit.train.muon import Muon, block_matrices

BLOCK = 65536
DECAY = 0.9999


def median_times(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time of each job, in turns, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(1 + rounds):
        for name, job in jobs.items():
            before = time.process_time()
            job()
            if i:
                found[name].append(time.process_time() - before)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="uvit_t2i_small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--muon", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    world = single_process_world("cpu")
    unet = UViTT2IModel(**resolve_model_config(options.model))
    parameters = list(unet.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-4
    if options.muon:
        compare_muon(unet, options.rounds)
        return
    settings = {"betas": (0.9, 0.9), "weight_decay": 0.03}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, **settings)  # type: ignore[arg-type]
    optimizer.step()
    ema, rare = EMA(unet, DECAY), EMA(unet, DECAY, update_steps=10)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    grad_norm = GradientNorm(parameters, world)
    norm = grad_norm()
    steps = [0]

    def plain() -> None:
        factor = torch.clamp(1e9 / (grad_norm() + 1e-6), max=1.0)
        torch._foreach_mul_([local_tensor(grad) for grad in grads], factor)
        optimizer.step()
        averages = [local_tensor(parameter) for parameter in ema.model.parameters()]
        torch._foreach_lerp_(averages, [local_tensor(parameter) for parameter in parameters], 1 - DECAY)

    def ours(average: EMA, max_norm: float) -> None:
        clip_gradients(parameters, max_norm, grad_norm())
        optimizer.step()
        steps[0] += 1
        average.update(unet, steps[0])

    def ten(job: Callable[[], None]) -> Callable[[], None]:
        return lambda: [job() for _ in range(10)] and None

    states = [[optimizer.state[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq")]
    averages = [parameter.detach() for parameter in ema.model.parameters()]
    weights = [parameter.detach() for parameter in parameters]
    blocks = list(zip(*(split(tensors) for tensors in (weights, grads, *states, averages)), strict=True))
    count = torch.tensor(3.0)

    def cached() -> None:
        clip_gradients(parameters, 1e9, grad_norm())
        for weight, grad, mean, square, average in blocks:
            torch._fused_adamw_(
                [weight], [grad], [mean], [square], [], [count],
                lr=1e-4, beta1=0.9, beta2=0.9, weight_decay=0.03, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
            average.lerp_(weight, 1 - DECAY)

    bytes_of = {"yardstick": 8, "norm": 4, "clip": 8, "AdamW": 28, "EMA": 12}
    parts = median_times(
        {
            "yardstick": lambda: torch._foreach_mul_(averages, 1.0),
            "norm": lambda: grad_norm(),
            "clip": lambda: clip_gradients(parameters, float(norm) * 0.999, norm),
            "AdamW": optimizer.step,
            "EMA": lambda: ema.update(unet, 1),
        },
        options.rounds,
    )
    designs = {
        "plain": (plain, 52),
        "uvit, a step that clips": (lambda: ours(ema, 1e-9), 52),
        "uvit": (lambda: ours(ema, 1e9), 44),
        "uvit, --ema_update_steps 10": (ten(lambda: ours(rare, 1e9)), 33.2),
        "cached": (cached, 40),
    }
    whole = median_times({name: job for name, (job, _) in designs.items()}, options.rounds)
    whole["uvit, --ema_update_steps 10"] /= 10
    num_parameters = sum(parameter.numel() for parameter in parameters)
    rate = bytes_of["yardstick"] * num_parameters / parts["yardstick"]
    print(f"{num_parameters:,} parameters\n")
    print("| | bytes | ms | GB/s | ms at the yardstick's rate |\n|---|---:|---:|---:|---:|")
    sizes: dict[str, float] = bytes_of | {name: size for name, (_, size) in designs.items()}
    for name, seconds in (parts | whole).items():
        total = sizes[name] * num_parameters
        print(
            f"| {name} | {sizes[name]} | {seconds * 1e3:.1f} | {total / seconds / 1e9:.1f} | {total / rate * 1e3:.1f} |"
        )


def compare_muon(unet: UViTT2IModel, rounds: int) -> None:
    matrices = block_matrices(unet)
    groups = [
        {
            "params": [matrix for matrix, number in matrices.items() if number == count],
            "num_matrices": count,
            "lr": 1e-3,
        }
        for count in sorted(set(matrices.values()))
    ]
    ours = Muon(groups, torch.optim.AdamW([torch.zeros(1)]), 0.03, torch.bfloat16)
    theirs = torch.optim.Muon(list(matrices), adjust_lr_fn="match_rms_adamw")
    found = median_times({"uvit": ours.step, "torch.optim.Muon": theirs.step}, rounds)
    print("| | ms |\n|---|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds * 1e3:.0f} |")


def split(tensors: list[Tensor]) -> list[Tensor]:
    return [block for tensor in tensors for block in tensor.view(-1).split(BLOCK)]


if __name__ == "__main__":
    main()
