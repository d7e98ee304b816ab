"""The first hour on a GPU: first whether everything is right, then how fast it is. runs/first_gpu_hour.sh calls it.

    python benchmarks/first_gpu_hour.py [--device cuda] [--output_dir output/first_gpu_hour] [--only CHECK ...]
    python benchmarks/first_gpu_hour.py --device cpu --tiny       # the same, very small, where there is no GPU

The checks stand in the order of what must be true first. Each prints a table and adds it to OUTPUT_DIR/report.md, which
can go into docs/benchmarks.md as it is. The first thing that is wrong ends the hour with a sentence and exit status 1.
Every training is a `uvit train` of its own, on random features of COCO's shapes. All tolerances are in this file.
"""

import argparse
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uvit.bench.random_store import write_random_store
from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.cli.main import main as uvit_main
from uvit.cli.parse import parse
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.train.dry_run import build_meta_run, plan_of_run
from uvit.train.profiling import count_flops, known_peak, meta_unet

MODELS = {"S/2": "uvit_t2i_small", "L/2": "uvit_t2i_large", "H/2": "uvit_t2i_huge"}
BATCHES = (32, 64, 128, 256, 512)
# A precision: (its flags, the largest relative difference from float32 on the CPU of: a loss, a gradient norm, the
# change of the weights in five steps). Ten times what half precision on a CPU differs by, with a U-ViT of 2 and of 8
# layers: 1e-4, 1e-3 and 9e-3 in bf16, 9e-6, 1e-4 and 1e-3 in fp16, whose 10 bits of mantissa TF32 has as well.
EXACT = ("--bf16", "False", "--tf32", "False")
PRECISIONS: dict[str, tuple[tuple[str, ...], tuple[float, float, float]]] = {
    "float32": (EXACT, (1e-5, 1e-4, 1e-3)),
    "TF32": (("--bf16", "False"), (1e-4, 1e-3, 1e-2)),
    "bf16": (("--bf16", "True"), (1e-3, 1e-2, 0.09)),
    "bf16 O2": (("--bf16", "True", "--fp16_opt_level", "O2"), (1e-3, 1e-2, 0.09)),
    "fp16": (("--bf16", "False", "--fp16", "True"), (1e-4, 1e-3, 1e-2)),
}
SAME_MATH = PRECISIONS["TF32"][1]  # compiled or not: other kernels, other orders of sums
MODES = {
    "fp32 (TF32)": ("--bf16", "False", "--compile", "False"),
    "bf16": ("--bf16", "True", "--compile", "False"),
    "bf16, CUDA graph": ("--bf16", "True", "--compile", "False", "--cuda_graphs"),
    "bf16, compiled": ("--bf16", "True", "--compile", "True"),
    "bf16, compiled, CUDA graph": ("--bf16", "True", "--compile", "True", "--cuda_graphs"),
}
ATTENTION_ERROR = 0.02  # relative, of outputs and gradients in bf16; one rounding is up to 0.004
COMPARED = ("losses", "gradient norms", "changes of the weights")
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


class WrongError(Exception):
    """What is wrong: a sentence that ends the hour."""


class CommandError(Exception):
    """A command of uvit failed; its message."""


@dataclass
class Hour:
    device: str
    tiny: bool
    folder: Path
    models: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = dict(MODELS)
        if self.tiny:
            sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2}
            sizes |= {"attention_head_dim": 16, "clip_dim": 32, "num_text_tokens": 16}
            (self.folder / "tiny.json").write_text(json.dumps(sizes))
            self.models = {"tiny": str(self.folder / "tiny.json")}
        self.model = next(iter(self.models.values()))
        self.features = self.folder / "features"
        if not self.features.exists():
            write_random_store(self.features, meta_unet(resolve_model_config(self.model)), 64 if self.tiny else 4096)
        self.is_gpu = self.device.startswith("cuda")
        self.num_runs = 0

    # Commands

    def uvit(self, *words: str, launch: tuple[str, ...] = ("-m",)) -> str:
        """What a command prints. A process of its own, since a fault of a GPU stays with it; or, tiny, this one."""
        if self.tiny and launch == ("-m",):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                try:
                    status = uvit_main(list(words))
                except Exception as error:  # in a process of its own, a traceback and status 1
                    raise CommandError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
            text = printed.getvalue()
        else:
            command = [sys.executable, *launch, "uvit", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            status, text = done.returncode, done.stdout
        if status:
            raise CommandError((text.strip().splitlines() or ["nothing was printed"])[-1])
        return text

    def words(self, run: Path, steps: int, flags: tuple[str, ...], model: str | None = None) -> list[str]:
        words = ["train", "--feature_path", str(self.features), "--output_dir", str(run), "--device", self.device]
        words += ["--uvit_config_file", model or self.model, "--max_steps", str(steps), "--warmup_steps", "0"]
        words += ["--save_steps", str(steps), "--image_logging_steps", "-1", "--eval_steps", "-1", "--disable_tqdm"]
        return [*words, "--ema_decay", "0.9", "--report_to", "none", *flags]

    def train(self, *flags: str, steps: int = 5, batch: int | None = None, model: str | None = None) -> "Training":
        self.num_runs += 1
        run = self.folder / f"run-{self.num_runs}"
        size = ("--per_device_train_batch_size", str(batch or (4 if self.tiny else 8)))
        self.uvit(*self.words(run, steps, (*size, *flags), model))
        return read_training(run)


@dataclass
class Training:
    run: Path
    lines: list[dict[str, Any]]  # of metrics.jsonl

    def weights(self) -> Tensor:
        """All of them, in a row, after the last step."""
        weights = read_checkpoint(checkpoint_folders(self.run)[-1]).load("weights")
        return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def read_training(run: Path) -> Training:
    lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Training(run, [json.loads(line) for line in lines])


def differences(one: Training, other: Training, start: Tensor) -> tuple[float, float, float]:
    """The largest relative differences of losses and gradient norms; and of the change of the weights since `start`."""
    found = []
    for name in ("loss", "grad_norm"):
        pairs = [(a[name], b[name]) for a, b in zip(one.lines, other.lines, strict=True)]
        if any(value is None or not math.isfinite(value) for pair in pairs for value in pair):
            return math.inf, math.inf, math.inf
        found.append(max(abs(a - b) / abs(b) for a, b in pairs))
    first, second = one.weights() - start, other.weights() - start
    return found[0], found[1], float((first - second).norm() / second.norm())


# Checks: each yields lines of Markdown, and raises WrongError


def check_card(hour: Hour) -> Iterator[str]:
    """What computes here."""
    yield "| | |\n|---|---|"
    yield f"| torch | {torch.__version__} |"
    if not hour.is_gpu:
        yield f"| device | CPU, {torch.get_num_threads()} threads |"
        return
    if not torch.cuda.is_available():
        raise WrongError(
            f"torch {torch.__version__} sees no GPU: install the build for your CUDA version (pytorch.org)"
        )
    name, memory = torch.cuda.get_device_name(hour.device), torch.cuda.get_device_properties(hour.device).total_memory
    yield f"| GPU | {torch.cuda.device_count()} x {name}, {memory / 2**30:.1f} GiB |"
    yield f"| bf16 | {'yes' if torch.cuda.is_bf16_supported(including_emulation=False) else 'no'} |"
    yield f"| CUDA, cuDNN | {torch.version.cuda}, {torch.backends.cudnn.version()} |"
    peaks = [known_peak(name, dtype) for dtype in (torch.bfloat16, torch.float32)]
    words = ", ".join("unknown" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s" for peak in peaks)
    yield f"| peak of the data sheet, 16 bits and float32 | {words} |"


def check_training(hour: Hour) -> Iterator[str]:
    """Training here equals training in float32 on the CPU."""
    reference_hour = Hour("cpu", hour.tiny, hour.folder)
    reference_hour.num_runs = 1000  # folders of its own
    reference = reference_hour.train(*EXACT)
    start = reference_hour.train(*EXACT, "--learning_rate", "0", steps=1).weights()
    yield "| precision | loss | gradient norm | change of the weights | allowed |\n|---|---:|---:|---:|---|"
    for name, (flags, allowed) in PRECISIONS.items():
        found = differences(hour.train(*flags), reference, start)
        yield f"| {name} | {found[0]:.1e} | {found[1]:.1e} | {found[2]:.1e} | {', '.join(f'{x:g}' for x in allowed)} |"
        for what, value, most in zip(COMPARED, found, allowed, strict=True):
            if not value <= most:
                raise WrongError(
                    f"{name}: the {what} differ by {value:.1e} from float32 on the CPU, and only {most:g} is allowed; "
                    f"do not train in this precision here"
                )


def check_attention(hour: Hour) -> Iterator[str]:
    """Each backend of attention at U-ViT's lengths, against float64; and its time."""
    heads, dim, length, patches, samples = (2, 16, 33, 16, 2) if hour.tiny else (8, 64, 334, 256, 64)
    rate: dict[str, float] = {}
    yield "| queries x keys | backend | output | gradients of q, k, v | forward and backward, ms |"
    yield "|---|---|---:|---:|---:|"
    for queries in (length, patches):
        generator = torch.Generator().manual_seed(queries)
        shapes = [(samples, heads, n, dim) for n in (queries, length, length, queries)]
        exact = [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]
        with sdpa_kernel(SDPBackend.MATH):
            wanted = attention_and_gradients(exact)
        for name in BACKENDS:
            given = [tensor.to(hour.device, torch.bfloat16) for tensor in exact]
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    found = attention_and_gradients(given)
                    milliseconds = time_of(lambda given=given: attention_and_gradients(given), hour)
            except RuntimeError as error:
                yield f"| {queries} x {length} | {name} | not here: {' '.join(str(error).split())[:60]} | | |"
                continue
            errors = [relative_error(one.cpu(), other) for one, other in zip(found, wanted, strict=True)]
            shown = ", ".join(f"{error:.1e}" for error in errors[1:])
            yield f"| {queries} x {length} | {name} | {errors[0]:.1e} | {shown} | {milliseconds:.2f} |"
            if not max(errors) <= ATTENTION_ERROR:
                raise WrongError(
                    f"attention by {name} of {queries} queries and {length} keys is off by {max(errors):.1e}, and "
                    f"{ATTENTION_ERROR} is allowed: switch it off (torch.backends.cuda.enable_cudnn_sdp and the like)"
                )
            rate[name] = rate.get(name, 0.0) + milliseconds
    if rate:
        yield f"\nThe fastest is {min(rate, key=rate.__getitem__)}. torch itself chooses by its own order."


def attention_and_gradients(tensors: list[Tensor]) -> list[Tensor]:
    """q, k, v and the gradient of the output -> the output, and the gradients of q, k, v."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    output = F.scaled_dot_product_attention(q, k, v)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), tensors[3])]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def time_of(job: Callable[[], object], hour: Hour, rounds: int = 20) -> float:
    """Milliseconds, after a first round that does not count."""
    started = 0.0
    for i in range(-1, rounds):
        job()
        if i in (-1, rounds - 1) and hour.is_gpu:
            torch.cuda.synchronize()
        if i == -1:
            started = time.perf_counter()
    return (time.perf_counter() - started) / rounds * 1000


def check_compile(hour: Hour) -> Iterator[str]:
    """Compiled blocks, and forward and backward replayed from a CUDA graph, equal eager ones."""
    eager = ("--compile", "False")
    ways = {"compiled": ("--compile", "True")}
    if hour.is_gpu:
        ways |= {"CUDA graph": (*eager, "--cuda_graphs"), "both": ("--compile", "True", "--cuda_graphs")}
    start = hour.train("--learning_rate", "0", "--bf16", "False", *eager, steps=1).weights()
    reference = hour.train("--bf16", "False", *eager)
    yield "| | loss | gradient norm | change of the weights |\n|---|---:|---:|---:|"
    for name, flags in ways.items():
        found = differences(hour.train("--bf16", "False", *flags), reference, start)
        yield f"| {name} | {found[0]:.1e} | {found[1]:.1e} | {found[2]:.1e} |"
        if not all(value <= most for value, most in zip(found, SAME_MATH, strict=True)):
            numbers = ", ".join(f"{value:.1e}" for value in found)
            raise WrongError(f"{name}: differs from eager by {numbers} (loss, gradient norm, change of the weights)")


def check_replicas(hour: Hour) -> Iterator[str]:
    """Two processes with half of the batch each equal one."""
    if hour.is_gpu and torch.cuda.device_count() < 2:
        yield "Not tried: there is one GPU."
        return
    size, steps = 8, 5
    one = hour.train(*EXACT, batch=size)
    start = hour.train(*EXACT, "--learning_rate", "0", batch=size, steps=1).weights()
    run = hour.folder / "replicas"
    flags = (*EXACT, "--per_device_train_batch_size", str(size // 2), "--dp_degree", "2")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    hour.uvit(*hour.words(run, steps, flags), launch=launch)
    found = differences(read_training(run), one, start)
    yield "| | loss | gradient norm | change of the weights |\n|---|---:|---:|---:|"
    yield f"| 2 processes, {'NCCL' if hour.is_gpu else 'gloo'} | {found[0]:.1e} | {found[1]:.1e} | {found[2]:.1e} |"
    if not all(value <= most for value, most in zip(found, PRECISIONS["float32"][1], strict=True)):
        raise WrongError("two processes train other weights than one with the same batch: do not use --dp_degree here")


def check_resume(hour: Hour) -> Iterator[str]:
    """Killed and resumed equals not interrupted, bit for bit."""
    steps, every = (300, 20) if hour.tiny else (60, 10)
    flags = ("--bf16", "False", "--deterministic", "True", "--compile", "False", "--per_device_train_batch_size", "4")
    flags += ("--save_steps", str(every))
    whole = hour.folder / "undisturbed"
    hour.uvit(*hour.words(whole, steps, flags))
    run = hour.folder / "killed"
    command = [sys.executable, "-m", "uvit", *hour.words(run, steps, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not checkpoint_folders(run) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    killed_at = len(read_training(run).lines)
    hour.uvit(*hour.words(run, steps, flags))
    found, wanted = read_training(run).weights(), read_training(whole).weights()
    if not torch.equal(found, wanted):
        raise WrongError(
            f"a run that was killed at step {killed_at} and resumed ends {relative_error(found, wanted):.1e} away from "
            "one that was not: with --deterministic every bit must be the same"
        )
    yield f"Killed at step {killed_at} of {steps}, resumed: the same weights, bit for bit."


def check_speed(hour: Hour) -> Iterator[str]:
    """Images a second, utilisation, memory and launches of a training step."""
    batches, warm, timed = ((4,), 2, 4) if hour.tiny else (BATCHES, 20, 20)
    yield (
        "| model | precision | batch | images/s | ms a step | utilisation | memory, GiB | planned | kernels a step |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for title, model in hour.models.items():
        for mode, flags in MODES.items():
            if hour.tiny and mode not in ("fp32 (TF32)", "bf16"):
                continue
            for size in batches:
                row = f"| {title} | {mode} | {size} |"
                try:
                    yield f"{row} {speed_of(hour, model, flags, size, warm, timed)}"
                except CommandError as error:
                    yield f"{row} {error} | | | | | |"
                    break


def speed_of(hour: Hour, model: str, flags: tuple[str, ...], size: int, warm: int, timed: int) -> str:
    steps = warm + timed + 3  # the last ones are recorded
    profiled = ("--profiler_options", f"{steps - 2},{steps - 2}", "--logging_steps", str(timed))
    training = hour.train(*flags, *profiled, steps=steps, batch=size, model=model)
    # A step may end before the device has computed it; a line of the log waits for it.
    seconds = sum(line["seconds"] for line in training.lines[warm : warm + timed]) / timed
    _, flops = count_flops(resolve_model_config(model))
    dtype = torch.bfloat16 if flags[:2] == ("--bf16", "True") else torch.float32
    name = torch.cuda.get_device_name(hour.device) if hour.is_gpu else ""
    peak = known_peak(name, dtype)
    used = "" if peak is None else f"{flops * size / seconds / peak:.1%}"
    words = [*hour.words(training.run, steps, flags, model), "--per_device_train_batch_size", str(size)]
    config, _ = parse(TrainConfig, words[1:], prog="uvit train")
    planned = sum(plan_of_run(build_meta_run(config)).memory.values()) / 2**30
    memory = f"{training.lines[warm + timed - 1]['peak_memory_bytes'] / 2**30:.1f}" if hour.is_gpu else ""
    launches = str(sum(kernels_of(training.run).values())) if hour.is_gpu else ""
    return f"{size / seconds:,.0f} | {1000 * seconds:,.1f} | {used} | {memory} | {planned:.1f} | {launches} |"


def kernels_of(run: Path) -> Counter[str]:
    """How often each kernel was launched in the trace of a run."""
    return Counter(event["name"] for event in trace_of(run) if event.get("cat") == "kernel")


def trace_of(run: Path) -> list[dict[str, Any]]:
    (path,) = (run / "logs").glob("trace-*.json")
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def check_profile(hour: Hour) -> Iterator[str]:
    """Where the time of ten steps goes."""
    flags = MODES["bf16"] if hour.is_gpu else MODES["fp32 (TF32)"]
    size, first = (4, 2) if hour.tiny else (256, 20)
    training = hour.train(*flags, "--profiler_options", f"{first},{first + 9}", steps=first + 12, batch=size)
    kind = "kernel" if hour.is_gpu else "cpu_op"
    micro: Counter[str] = Counter()
    for event in trace_of(training.run):
        if event.get("cat") == kind:
            micro[event["name"]] += event["dur"]
    if not micro:
        raise WrongError(f"the profile of ten steps has no {kind}s: {training.run / 'logs'}")
    total = sum(micro.values())
    yield f"| {'kernel' if hour.is_gpu else 'operation, with what it calls'} | ms a step | share |\n|---|---:|---:|"
    for name, microseconds in micro.most_common(20):
        yield f"| `{name[:80]}` | {microseconds / 1e4:.3f} | {microseconds / total:.1%} |"
    yield f"\nThe trace, for chrome://tracing or Perfetto: {next((training.run / 'logs').glob('trace-*.json')).name}."


def check_sampling(hour: Hour) -> Iterator[str]:
    """`uvit extract` and `uvit sample`: images a second, with encoders of the real sizes and random weights."""
    encoders = write_encoders(hour)
    images, captions = hour.folder / "images", ["a cat on a street", "a green bus", "two red birds", "a tree"]
    count, side = (8, 16) if hour.tiny else (2048, 256)
    if not images.exists():
        write_images(images, captions, count, side)
    yield "| | images/s |\n|---|---:|"
    precision = () if hour.tiny else ("--bf16",)
    printed = hour.uvit(
        "extract", "--source", str(images), "--resolution", str(side), "--device", hour.device, "--output_dir",
        str(hour.folder / "extracted"), "--vae_name_or_path", str(encoders / "vae"), "--text_encoder_name_or_path",
        str(encoders / "clip"), "--num_workers", str(0 if hour.tiny else max(2, (os.cpu_count() or 2) - 2)),
        "--model_max_length", str(16 if hour.tiny else 77), "--disable_tqdm", *precision,
    )  # fmt: skip
    yield f"| extract, {count} images | {rate_in(printed)} |"
    run = hour.train(steps=1).run
    pipeline = hour.folder / "pipeline"
    hour.uvit(
        "convert", str(checkpoint_folders(run)[-1]), str(pipeline), "--vae_name_or_path", str(encoders / "vae"),
        "--text_encoder_name_or_path", str(encoders / "clip"), "--tokenizer_name", str(encoders / "clip"),
    )  # fmt: skip
    for dtype in ("float32", "bfloat16", "float16")[: 1 if hour.tiny else 3]:
        batch, number = (2, 4) if hour.tiny else (32, 256)
        printed = hour.uvit(
            "sample", *captions, "--pipeline", str(pipeline), "--device", hour.device, "--dtype", dtype, "--batch_size",
            str(batch), "--num_images_per_prompt", str(number // len(captions)), "--guidance_scale", "2",
            "--num_inference_steps", "2" if hour.tiny else "50", "--disable_tqdm", "--output_dir",
            str(hour.folder / f"samples-{dtype}"),
        )  # fmt: skip
        steps = 2 if hour.tiny else 50
        yield f"| sample, {dtype}, batches of {batch}, {steps} steps with guidance | {rate_in(printed)} |"


def rate_in(printed: str) -> str:
    """The rate in the last line of a progress bar."""
    words = printed.replace(",", " ").split()
    rates = [words[i - 1] for i, word in enumerate(words) if word in ("images/s", "pairs/s")]
    return rates[-1] if rates else "?"


def write_images(folder: Path, captions: list[str], count: int, side: int) -> None:
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        blocks = Image.fromarray(random.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        blocks.resize((side * 3 // 2, side * 5 // 4), Image.Resampling.BICUBIC).save(
            folder / f"{i:05d}.jpg", quality=90
        )
        (folder / f"{i:05d}.txt").write_text(captions[i % len(captions)], encoding="utf-8")


def write_encoders(hour: Hour) -> Path:
    """A VAE and a CLIP text encoder as large as those of Stable Diffusion; tiny: very small ones."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from uvit.extract.tokenizer import train_tokenizer

    folder = hour.folder / "encoders"
    if (folder / "clip").exists():
        return folder
    levels, width, tokens = ([8, 8], 32, 16) if hour.tiny else ([128, 256, 512, 512], 768, 77)
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(levels), up_block_types=["UpDecoderBlock2D"] * len(levels),
        block_out_channels=levels, layers_per_block=2, latent_channels=4, norm_num_groups=min(32, levels[0] // 2),
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    tokenizer = train_tokenizer(["a cat on a street", "a green bus", "two red birds", "a tree"] * 20, 320, tokens)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers, heads = (1, 2) if hour.tiny else (12, 12)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=tokens, **special,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder


CHECKS: dict[str, Callable[[Hour], Iterator[str]]] = {
    "card": check_card,
    "training": check_training,
    "attention": check_attention,
    "compile": check_compile,
    "replicas": check_replicas,
    "resume": check_resume,
    "speed": check_speed,
    "profile": check_profile,
    "sampling": check_sampling,
}


def run_checks(hour: Hour, names: list[str]) -> int:
    """Returns the exit status."""
    report = hour.folder / "report.md"
    report.write_text("", encoding="utf-8")

    def say(text: str) -> None:
        print(text, flush=True)
        with report.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    for name in names:
        started = time.perf_counter()
        say(f"\n### {(CHECKS[name].__doc__ or '').strip().rstrip('.')}\n")
        try:
            for line in CHECKS[name](hour):
                say(line)
        except (WrongError, CommandError) as error:
            say(f"\nWRONG ({name}): {error}")
            return 1
        print(f"({name}: {time.perf_counter() - started:.0f} s)", flush=True)
    print(f"\nEverything is right here. {report} is for docs/benchmarks.md.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="very small networks and few steps, in this process")
    parser.add_argument("--output_dir", type=Path, default=Path("output/first_gpu_hour"))
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="these checks alone")
    options = parser.parse_args(arguments)
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        parser.error(f"--output_dir {options.output_dir}: is not empty; every hour needs a folder of its own")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    return run_checks(Hour(options.device, options.tiny, options.output_dir), options.only)


if __name__ == "__main__":
    sys.exit(main())
