"""When replicas begin to send their gradients, as a share of the backward pass: eager, and compiled in two ways.

    torchrun --nproc_per_node 2 benchmarks/overlap.py --uvit_config_file uvit_t2i_small

Two processes on this machine, over gloo, with the backend aot_eager, which makes the graphs of inductor and takes
seconds to compile. `whole` compiles the network as one graph, as earlier versions did: it hands out all gradients when
it is done. `blocks` is what `uvit train --compile` does. Times are medians, on the first process.
"""

import argparse
import statistics
import time

import torch

from uvit.compiling import compile_blocks
from uvit.config.model import resolve_model_config
from uvit.distributed.mesh import Degrees, World, destroy_distributed, init_distributed
from uvit.distributed.ops import BUCKET_BYTES, GradientAverage, barrier
from uvit.model import UViTT2IModel
from uvit.weights.unet import new_unet

BACKEND = "aot_eager"


class TimedAverage(GradientAverage):
    """Notes when each bucket is sent."""

    sent_at: list[float]

    def _send(self) -> None:
        self.sent_at.append(time.perf_counter())
        super()._send()


def measure(
    unet: UViTT2IModel, world: World, bucket_bytes: int, batch_size: int, rounds: int
) -> tuple[float, float, int]:
    """(seconds until the first send, seconds of the backward pass, number of sends), after two rounds to warm up."""
    average = TimedAverage(unet, world, bucket_bytes)
    model = unet.config
    height, width = (side * unet.patch_size for side in unet.grid)
    latents = torch.randn(batch_size, model.in_channels, height, width)
    context = torch.randn(batch_size, model.num_text_tokens, model.clip_dim)
    timesteps = torch.full((batch_size,), 500)
    found = []
    for round_ in range(rounds + 2):
        average.microbatch(last=True)
        loss = unet(latents, timesteps, context).square().mean()
        average.sent_at = []
        barrier(world)
        started = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        average.finish()
        unet.zero_grad()
        if round_ >= 2:
            found.append((average.sent_at[0] - started, ended - started, len(average.sent_at)))
    return tuple(statistics.median(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvit_config_file", default="uvit_t2i_small")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--bucket_mib", type=float, default=BUCKET_BYTES / 2**20, help="gradients of a send")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    world = init_distributed(Degrees(dp=2), "cpu")
    for name in ("eager", "whole", "blocks"):
        torch.manual_seed(0)
        unet = new_unet(resolve_model_config(options.uvit_config_file)).train()
        if name == "whole":
            unet.compile(backend=BACKEND)
        if name == "blocks":
            compile_blocks([*unet.in_blocks, unet.mid_block, *unet.out_blocks], BACKEND)
        bucket_bytes = round(options.bucket_mib * 2**20)
        first, backward, sends = measure(unet, world, bucket_bytes, options.batch_size, options.rounds)
        if world.is_main:
            print(
                f"{name:<7} first of {sends} sends after {first * 1e3:6.0f} of {backward * 1e3:6.0f} ms of the "
                f"backward pass: {first / backward:.0%}"
            )
    destroy_distributed(world)


if __name__ == "__main__":
    main()
