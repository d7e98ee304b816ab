"""Compare samplers: error against the network's work and the time, on trained models.

    python benchmarks/sampling.py --model shapes output/demo/run/pipeline shapes --model emoji RUN/pipeline prompts.txt

A model is a name, a pipeline and its prompts: a text file with one a line, or `shapes`, the built-in data's held-out
ones. Solvers are fitted on some of the prompts, and all are measured on others, with other noise. The error is the root
mean square distance of the latents to where the same flow ends when it is solved in many steps, relative to their size.
The official sampler stops at timestep 1 and is compared with the flow there; all others continue to x_0. "plain 2M" is
diffusers' DPM-Solver++ without the damping that `dpmsolver++` adds. One thread; times are medians of rounds in which
all take turns. For `shapes` also the prompt accuracy on held-out prompts. Writes tables as Markdown, all figures as
JSON, and a plot.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from uvit.evaluate.attributes import AttributeReader, accuracies
from uvit.evaluate.prompts import Prompt
from uvit.images import save_png, to_pil
from uvit.sample.denoise import ALL_TIMESTEPS, denoise
from uvit.sample.fit import Recorder, SampleLatents, fit_plan, solve
from uvit.sample.load import open_pipeline
from uvit.sample.schedulers import MultistepScheduler, SolverPlan, build_scheduler, karras_grid, second_order
from uvit.sources.shapes import Scene, scenes
from uvit.train.profiling import count_flops
from uvit.weights.encoders import decode_latents

Interval = tuple[float, float]

OFFICIAL = ("official", 50)
STEPS = {
    "official": (14, 26, 50),
    "ddim": (8, 12, 24),
    "plain 2M": (8, 12, 24, 50),
    "dpmsolver++": (8, 12, 24, 50),
    "unipc": (8, 12, 24),
    "fitted": (6, 8, 12, 24),
}
COLOURS = {
    "official": "#000000",
    "ddim": "#999999",
    "plain 2M": "#92c5de",
    "dpmsolver++": "#2166ac",
    "unipc": "#7b3294",
    "fitted": "#d6301a",
}
TIMED = [("dpmsolver++", 12), *(("fitted", n) for n in STEPS["fitted"])]
NUM_FITTED_TO, NUM_ROUNDS = 16, 5


def read_prompts(source: str) -> list[str]:
    if source == "shapes":
        return [scene.captions()[i % 4] for i, scene in enumerate(scenes("heldout"))]
    return [line.strip() for line in Path(source).read_text("utf-8").splitlines() if line.strip()]


def drawing(
    pipeline: Any, prompts: list[str], seeds: list[int], guidance_scale: float, interval: Interval = ALL_TIMESTEPS
) -> SampleLatents:
    """Each prompt from each seed."""
    size = pipeline.unet.config.sample_size
    shape = (len(prompts), pipeline.unet.config.in_channels, size, size)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    context, empty = pipeline.encode_prompt(prompts).repeat(len(seeds), 1, 1), pipeline.encode_prompt("")
    kind = pipeline.config.prediction_type
    return lambda scheduler, n: denoise(
        pipeline.unet, scheduler, noise, context, empty, guidance_scale, n, kind, guidance_interval=interval
    )


def solver(kind: str, plans: list[SolverPlan]) -> Any:
    if kind == "fitted":
        return MultistepScheduler(plans)
    if kind == "plain 2M":
        return DPMSolverMultistepScheduler.from_config(build_scheduler("dpmsolver++").config)
    return build_scheduler(kind)


def errors(sampled: Tensor, reference: Tensor) -> tuple[float, float]:
    """(over all images together, median of the images), relative."""
    size = reference.square().mean().sqrt()
    each = (sampled - reference).square().mean(dim=(1, 2, 3)).sqrt()
    return (each.square().mean().sqrt() / size).item(), (each.median() / size).item()


def measure(
    name: str, path: str, source: str, guidance_scale: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    pipeline = open_pipeline(path, "cpu")
    if pipeline.conventions.path != "vp":
        raise SystemExit(
            f"{path}: is of path {pipeline.conventions.path}; give a model of vp, which all samplers sample"
        )
    order = torch.randperm(len(prompts := read_prompts(source)), generator=torch.Generator().manual_seed(0)).tolist()
    fitted_to = [prompts[i] for i in order[:NUM_FITTED_TO]]
    others = [prompts[i] for i in order[NUM_FITTED_TO : NUM_FITTED_TO + options.num_prompts]]
    tune = drawing(pipeline, fitted_to, [1], guidance_scale)
    report = drawing(pipeline, others, list(range(100, 100 + options.num_seeds)), guidance_scale)
    timed = drawing(pipeline, others, [100], guidance_scale)

    started = time.perf_counter()
    flow = solve(tune)
    plans = [fit_plan(tune, flow, n, (guidance_scale, *ALL_TIMESTEPS))[0] for n in STEPS["fitted"]]
    fitting = time.perf_counter() - started
    recorder = Recorder([second_order(karras_grid(options.reference_steps))])
    x_0 = report(recorder, options.reference_steps)
    x_1 = recorder.latents[-1]
    check, _ = errors(solve(report).x_0, x_0)

    flops = 2 * count_flops(dict(pipeline.unet.config))[0]  # with and without the prompt
    rows = []
    for kind, all_steps in STEPS.items():
        for n in all_steps:
            error, median = errors(report(solver(kind, plans), n), x_1 if kind == "official" else x_0)
            row = {"model": name, "guidance_scale": guidance_scale, "sampler": kind, "evaluations": n}
            rows.append(row | {"error": error, "median": median, "gflop": n * flops / 1e9})
            print(json.dumps(rows[-1]), flush=True)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in (OFFICIAL, *TIMED)}
    for _, (key, found) in itertools.product(range(NUM_ROUNDS), seconds.items()):
        started = time.perf_counter()
        timed(solver(key[0], plans), key[1])
        found.append((time.perf_counter() - started) / len(others))
    for row in rows:
        if found := seconds.get((row["sampler"], row["evaluations"]), []):
            row["seconds"] = sorted(found)[len(found) // 2]
    num = len(others) * options.num_seeds
    facts = {"fit_seconds": fitting, "images": num, "reference_error": check}
    return [row | facts for row in rows]


def prompts_right(path: str, options: argparse.Namespace) -> str:
    """Markdown: prompt accuracy on the held-out prompts of the built-in data, with and without a guidance interval."""
    pipeline = open_pipeline(path, "cpu")
    asked = [scene for scene in scenes("heldout") if isinstance(scene, Scene)]
    prompts = [scene.captions()[i % 4] for i, scene in enumerate(asked)]
    wanted = [Prompt(text, "", scene=scene) for text, scene in zip(prompts, asked, strict=True)]
    known = [scene.captions()[i % 4] for i, scene in enumerate(scenes("train")[:NUM_FITTED_TO])]
    ways = [OFFICIAL, ("plain 2M", 50), *(("dpmsolver++", n) for n in (50, 24)), ("fitted", 12), ("fitted", 8)]
    lines = ["| guidance | at timesteps | " + " | ".join(f"{kind}, {n}" for kind, n in ways) + " |"]
    lines.append("|---|---|" + "---|" * len(ways))
    for scale, interval in itertools.product(options.guidance_scales, (ALL_TIMESTEPS, (100.0, 1000.0))):
        guidance = (scale, *interval)
        tune = drawing(pipeline, known, [1], scale, interval)
        flow = solve(tune)
        plans = [fit_plan(tune, flow, n, guidance)[0] for kind, n in ways if kind == "fitted"]
        draw = drawing(pipeline, prompts, [0], scale, interval)
        cells = []
        for kind, n in ways:
            latents = draw(solver(kind, plans), n)
            images = to_pil(decode_latents(pipeline.vqvae, latents, pipeline.conventions))
            read = AttributeReader().extract(np.stack([np.asarray(image) for image in images]), wanted)
            cells.append(f"{accuracies(read['correct'], Scene)['prompts']:.1%}")
        lines.append(f"| {scale:g} | {interval[0]:g} to {interval[1]:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each sampler, a column for each model and guidance."""
    groups = list(dict.fromkeys((row["model"], row["guidance_scale"]) for row in rows))
    lines = ["| sampler | evaluations | " + " | ".join(f"{name}, guidance {scale:g}" for name, scale in groups) + " |"]
    lines.append("|---|---|" + "---|" * len(groups))
    for kind, n in dict.fromkeys((row["sampler"], row["evaluations"]) for row in rows):
        cells = []
        for group in groups:
            row = find(rows, *group, kind, n)
            cells.append(f"{row['error']:.4f} ({row['median']:.4f})")
        lines.append(f"| {kind} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def savings(rows: list[dict[str, Any]]) -> str:
    """Markdown: fewer steps beside the official fifty evaluations."""
    lines = ["| model | guidance | official: error, s | sampler | error | work saved | s | time saved |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, scale in dict.fromkeys((row["model"], row["guidance_scale"]) for row in rows):
        base = find(rows, name, scale, *OFFICIAL)
        for kind, n in TIMED:
            row = find(rows, name, scale, kind, n)
            cells = [name, f"{scale:g}", f"{base['error']:.4f}, {base['seconds']:.3f}", f"{kind}, {n}"]
            cells.append(f"{row['error']:.4f}")
            cells += [f"{base['gflop'] / row['gflop']:.1f}", f"{row['seconds']:.3f}"]
            lines.append("| " + " | ".join([*cells, f"{base['seconds'] / row['seconds']:.1f}"]) + " |")
    return "\n".join(lines)


def find(rows: list[dict[str, Any]], model: str, scale: float, kind: str, n: int) -> dict[str, Any]:
    keys = ("model", "guidance_scale", "sampler", "evaluations")
    return next(row for row in rows if tuple(row[key] for key in keys) == (model, scale, kind, n))


def plot(rows: list[dict[str, Any]]) -> Image.Image:
    """Error against evaluations, both on logarithmic scales: a panel for each model and guidance."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    scales = list(dict.fromkeys(row["guidance_scale"] for row in rows))
    width, height, left, top = 380, 300, 56, 34
    image = Image.new("RGB", (width * len(scales), height * len(models) + 30), "white")
    pen, font = ImageDraw.SampleLatents(image), ImageFont.load_default(13)
    low, high = (math.log10(edge(row["error"] for row in rows)) for edge in (min, max))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    for (i, model), (j, scale) in itertools.product(enumerate(models), enumerate(scales)):
        x0, y0, x1, y1 = j * width + left, i * height + top, (j + 1) * width - 12, (i + 1) * height - 36

        def place(n: int, error: float, box: tuple[int, int, int, int] = (x0, y0, x1, y1)) -> tuple[float, float]:
            across = math.log(n / 5) / math.log(60 / 5)
            up = (math.log10(error) - low) / (high - low)
            return box[0] + across * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

        pen.text((x0, y0 - 22), f"{model}, guidance {scale:g}", "black", font)
        for power in range(math.ceil(low), math.floor(high) + 1):
            y = place(5, 10**power)[1]
            pen.line([(x0, y), (x1, y)], "#dddddd")
            pen.text((x0 - 6, y), f"{10**power:g}", "black", font, anchor="rm")
        for n in (6, 8, 12, 24, 50):
            x = place(n, 1)[0]
            pen.line([(x, y0), (x, y1)], "#eeeeee")
            pen.text((x, y1 + 4), str(n), "black", font, anchor="ma")
        pen.rectangle([x0, y0, x1, y1], outline="black")
        for kind, colour in COLOURS.items():
            points = [place(n, find(rows, model, scale, kind, n)["error"]) for n in STEPS[kind]]
            pen.line(points, colour, 2)
            for x, y in points:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    x = left
    pen.text((x, image.height - 22), "error against evaluations of the network:", "black", font)
    x += int(font.getlength("error against evaluations of the network:")) + 16
    for kind, colour in COLOURS.items():
        pen.line([(x, image.height - 14), (x + 20, image.height - 14)], colour, 3)
        pen.text((x + 26, image.height - 22), kind, "black", font)
        x += 46 + int(font.getlength(kind))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs=3, action="append", required=True, metavar=("NAME", "PIPELINE", "PROMPTS"))
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[2.0, 4.0, 7.5])
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--reference_steps", type=int, default=500)
    parser.add_argument("--output_dir", default="output/sampling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output_dir, rows = Path(options.output_dir), []
    output_dir.mkdir(parents=True, exist_ok=True)
    for model, scale in itertools.product(options.model, options.guidance_scales):
        rows += measure(*model, scale, options)
        (output_dir / "sampling.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    parts = [savings(rows), table(rows)]
    parts += [prompts_right(path, options) for _, path, source in options.model if source == "shapes"]
    text = "\n\n".join(parts) + "\n"
    (output_dir / "sampling.md").write_text(text, "utf-8")
    save_png(plot(rows), output_dir / "sampling.png", {})
    print(text)


if __name__ == "__main__":
    main()
