"""A bf16 training step of uvit_t2i_small on the CPU, against that of a textbook implementation, step by step in turns.

    OMP_NUM_THREADS=1 python benchmarks/bf16_step.py [--batch_sizes 4 8] [--rounds 5] [--steps 3]

The textbook step is that of U-ViT's official code: autocast over float32 weights, all tokens through all blocks, fused
attention (PyTorch's), AdamW and the learning rate as PyTorch has them, and an EMA parameter by parameter. Each side is
a process of its own and waits while the other computes. A round is a few steps of each in turns, and its time is the
median of their CPU seconds (of all threads). The share of the matrix product rate is that of the FLOPs of a step, in
which recomputed activations and the optimizer do not count, at the rate that `uvit train` reports.
"""

import argparse
import copy
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvit.bench.run import build_bench_run, make_jobs
from uvit.config.bench import BenchConfig
from uvit.diffusion import add_noise
from uvit.model import timestep_embedding
from uvit.train.profiling import mfu_reference

NUM_WARM_UPS = 2
MODEL = "uvit_t2i_small"
DIM, DEPTH, NUM_HEADS, NUM_TEXT_TOKENS, TEXT_DIM, LATENTS, PATCH = 512, 12, 8, 77, 768, (4, 32, 32), 2


class TextbookBlock(nn.Module):
    def __init__(self, skip: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.skip_linear = nn.Linear(2 * DIM, DIM) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4).float()
        x = F.scaled_dot_product_attention(q, k, v)  # autocast makes it bf16 again
        return self.proj(x.transpose(1, 2).flatten(2))


class Textbook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels, height, width = LATENTS
        num_patches = height * width // PATCH**2
        self.patch_embed = nn.Conv2d(channels, DIM, PATCH, PATCH)
        self.context_embed = nn.Linear(TEXT_DIM, DIM)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + NUM_TEXT_TOKENS + num_patches, DIM))
        self.in_blocks = nn.ModuleList(TextbookBlock(skip=False) for _ in range(DEPTH // 2))
        self.mid_block = TextbookBlock(skip=False)
        self.out_blocks = nn.ModuleList(TextbookBlock(skip=True) for _ in range(DEPTH // 2))
        self.norm, self.decoder_pred = nn.LayerNorm(DIM), nn.Linear(DIM, PATCH**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        B, C, H, W = x.shape
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        time_token = timestep_embedding(timestep, DIM)[:, None]
        x = torch.cat([time_token, self.context_embed(context), patches], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 1 + NUM_TEXT_TOKENS :]
        x = x.view(B, H // PATCH, W // PATCH, PATCH, PATCH, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return self.final_layer(x)


def textbook_step(batch_size: int) -> Callable[[], object]:
    model = Textbook()
    ema_model = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.03, betas=(0.9, 0.9))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5000, 1))
    x_0, context = torch.randn(batch_size, *LATENTS), torch.randn(batch_size, NUM_TEXT_TOKENS, TEXT_DIM)

    def step() -> None:
        optimizer.zero_grad()
        timestep, noise = torch.randint(1, 1001, (batch_size,)), torch.randn_like(x_0)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(add_noise(x_0, noise, timestep), timestep, context)
        loss = (noise - prediction.float()).square().flatten(1).mean(dim=1)
        loss.mean().backward()
        optimizer.step()
        scheduler.step()
        parameters = dict(model.named_parameters())
        for name, average in ema_model.named_parameters():
            average.data.mul_(0.9999).add_((1 - 0.9999) * parameters[name].data)

    return step


def serve_textbook(pipe: Connection, batch_size: int) -> None:
    serve(pipe, textbook_step(batch_size), None)


def serve_uvit(pipe: Connection, batch_size: int) -> None:
    config = BenchConfig(MODEL, batch_size=batch_size, precision="bf16", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = build_bench_run(config, Path(folder))
        reference = mfu_reference(run)
        serve(pipe, make_jobs(config, run)[2], (reference.flops, reference.peak))


def serve(pipe: Connection, step: Callable[[], object], greeting: object) -> None:
    """Compute a step for each message and answer with its CPU seconds."""
    pipe.send(greeting)
    while pipe.recv():
        before = time.process_time()
        step()
        pipe.send(time.process_time() - before)


def compare(batch_size: int, rounds: int, steps: int) -> str:
    """-> a row of the table."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, greetings = [], [], []
    for serve_side in (serve_textbook, serve_uvit):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve_side, args=(theirs, batch_size)))
        processes[-1].start()
        pipes.append(ours)
        greetings.append(ours.recv())
    flops, peak = greetings[1]

    def step_in_turns() -> list[float]:
        found = []
        for pipe in pipes:
            pipe.send(True)
            found.append(pipe.recv())
        return found

    for _ in range(NUM_WARM_UPS):
        step_in_turns()
    table = []  # of (textbook, uvit) seconds, a round each
    for _ in range(rounds):
        table.append([statistics.median(side) for side in zip(*(step_in_turns() for _ in range(steps)), strict=True)])
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    textbook, uvit = zip(*table, strict=True)
    ratios = [b / a for a, b in table]
    shares = [flops / (seconds * peak) for seconds in uvit]
    cells = [three(textbook), three(uvit), three(ratios), f"{peak / 1e9:,.0f}", three([100 * s for s in shares], 0)]
    return f"| {batch_size} | {' | '.join(cells)} |"


def three(values: list[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    options = parser.parse_args()
    print(f"{MODEL}, bf16, {torch.get_num_threads()} threads; minimum / median / maximum of {options.rounds} rounds")
    print("| batch | textbook, s | uvit, s | uvit / textbook | GFLOP/s of matrix products | share of them, % |")
    print("|---|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        print(compare(batch_size, options.rounds, options.steps), flush=True)


if __name__ == "__main__":
    main()
