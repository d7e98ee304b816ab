"""`uvit bench`: time the training step and the forward pass beside the machine's own matrix product.

The yardstick is taken again before each measurement: on a shared machine the rate drifts by tens of per cent within a
minute, and only the ratio of neighbours says something about the code.
"""

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from uvit import diffusion
from uvit.bench.flops import count_flops, random_inputs
from uvit.config.bench import BenchConfig
from uvit.config.model import resolve_model_config
from uvit.errors import UserError
from uvit.model import UViTT2IModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench(config: BenchConfig) -> None:
    """Measure and print the table."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    model_config = resolve_model_config(config.uvit_config_file)
    forward_flops, step_flops = count_flops(model_config, config.batch_size)
    torch.manual_seed(0)
    with device:
        model = UViTT2IModel(**model_config)
        forward, train_step = make_forward(model, config), make_train_step(model, config)
        matmul = make_matmul(config)

    work = {"matmul": 2 * config.matmul_size**3, "forward": forward_flops, "training step": step_flops}
    seconds = measure({"matmul": matmul, "forward": forward, "training step": train_step}, config.steps, device)
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(
        f"{config.uvit_config_file}: {sum(p.numel() for p in model.parameters()):,} parameters, batch "
        f"{config.batch_size}, {config.precision}{', compiled' if config.compile else ''}, {device} ({threads}), "
        f"medians of {config.steps} rounds, matmul {config.matmul_size}x{config.matmul_size}"
    )
    print(table(work, seconds, config.batch_size))


def make_forward(model: UViTT2IModel, config: BenchConfig) -> Callable[[], object]:
    """A forward pass without gradients, as sampling does it."""
    run = torch.compile(model) if config.compile else model
    inputs = random_inputs(model, config.batch_size)

    def forward() -> None:
        with torch.no_grad(), _autocast(model.device, config):
            run(*inputs)

    return forward


def make_train_step(model: UViTT2IModel, config: BenchConfig) -> Callable[[], object]:
    """Forward, loss, backward, AdamW, EMA: what `uvit train` does to one batch that is already there."""
    if config.recompute:
        model.enable_gradient_checkpointing()
    run = torch.compile(model) if config.compile else model
    latents, timesteps, context = random_inputs(model, config.batch_size)
    noise = torch.randn_like(latents)
    parameters = list(model.parameters())
    ema = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.9), weight_decay=0.03, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "fp16")

    def train_step() -> None:
        noisy = diffusion.add_noise(latents, noise, timesteps)
        with _autocast(model.device, config):
            prediction = run(noisy, timesteps, context)
        scaler.scale(diffusion.loss(prediction, latents, noise, timesteps)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema, [parameter.detach() for parameter in parameters], 1e-4)

    return train_step


def make_matmul(config: BenchConfig) -> Callable[[], object]:
    """The yardstick: a square matrix product, in the precision's type."""
    dtype = DTYPES[config.precision]
    left, right, product = (torch.randn(config.matmul_size, config.matmul_size).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=product)


def measure(
    jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """{name: [(seconds of the job, seconds of the matmul just before and after it, averaged), ...]}; one round warms up."""
    matmul = jobs["matmul"]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for round_ in tqdm(range(rounds + 1), desc="bench", leave=False):
        before = _time(matmul, device)
        for name, job in jobs.items():
            elapsed = _time(job, device)
            after = _time(matmul, device)
            if round_:
                seconds[name].append((elapsed, (before + after) / 2))
            before = after
    return seconds


def table(work: dict[str, int], seconds: dict[str, list[tuple[float, float]]], batch_size: int) -> str:
    """Rows of median time and rate; the last column is the median of each round's own ratio to its matmul."""
    lines = [f"{'':<14}{'ms':>10}{'samples/s':>11}{'GFLOP':>10}{'GFLOP/s':>10}{'of matmul':>11}"]
    for name, flops in work.items():
        median = statistics.median(elapsed for elapsed, _ in seconds[name])
        ratio = statistics.median(
            (flops / elapsed) / (work["matmul"] / yardstick) for elapsed, yardstick in seconds[name]
        )
        samples = "" if name == "matmul" else f"{batch_size / median:.2f}"
        lines.append(
            f"{name:<14}{median * 1e3:>10.1f}{samples:>11}{flops / 1e9:>10.1f}{flops / median / 1e9:>10.1f}{ratio:>11.1%}"
        )
    return "\n".join(lines)


def _time(job: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    job()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _autocast(device: torch.device, config: BenchConfig) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: is no device; say cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no GPU that PyTorch {torch.__version__} can use; say cpu")
    return device
