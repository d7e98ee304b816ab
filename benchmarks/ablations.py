"""The ledger of ablations: arms that change one thing each, trained for equal seconds and judged alike.

    python benchmarks/ablations.py DATA [ARM ...] --features FOLDER [--seconds 1260] [--seeds 1 2 3]

`ablations.yaml` has the data sets and the arms. Of each arm, the CPU seconds of a step are measured first; --max_steps
is what fits into --seconds, so that schedules end where the runs end. Run the same command after any stop: what is done
is not done again. Results are in --output_dir: `ledger.jsonl`, a line for each run and setting; `ledger.md`, a row for
each arm, the best first; `curves-*.png`, validation losses by seconds. `runs/ablations.sh` writes the features, too.
"""

import argparse
import contextlib
import io
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from uvit.cli.main import main as run_uvit
from uvit.cli.parse import parse
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.io import link_or_copy, write_bytes, write_folder_atomically, write_json

TABLE = Path(__file__).with_name("ablations.yaml")
WINDOWS, WINDOW = 6, 10  # the step time is the median over windows of so many steps, without the first
POINTS = 10  # validations in a run
WARMUP = "0.04"  # of the steps
CLEAR = 0.04  # smaller differences are no finding, however small the spread
COLOURS = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
           (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207)]  # fmt: skip
Row = dict[str, Any]


# The arms


def read_table(path: Path = TABLE) -> dict[str, dict[str, Row]]:
    """{"data": {name: ...}, "arms": {name: ...}}"""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, arm in table["arms"].items():
        if unknown := set(arm) - {"train", "model", "data", "evaluate"}:
            allowed = "it may have train, model, data, evaluate"
            raise SystemExit(f"{path}: the arm {name} has {', '.join(sorted(unknown))}; {allowed}")
    return dict(table)


def arms_of(table: dict[str, dict[str, Row]], data: str) -> list[str]:
    return [name for name, arm in table["arms"].items() if data in arm.get("data", [data])]


def judge_of(table: dict[str, dict[str, Row]], data: str, arm: str) -> list[str]:
    """The flags of `uvit evaluate` for an arm."""
    return f"{table['data'][data]['evaluate']} {table['arms'][arm].get('evaluate', '')}".split()


def settings_of(
    table: dict[str, dict[str, Row]], data: str, arm: str, features: str, out: Path, more: Sequence[str] = ()
) -> Row:
    """`train`: the flags of `uvit train` for an arm; `config`: what they and their presets say; `model`: its content.

    With changes to the model, the flags name OUT/model.json.
    """
    shared, own = table["data"][data], table["arms"][arm]
    words = ["--feature_path", features, *shared.get("train", "").split(), *own.get("train", "").split(), *more]
    words += ["--warmup_steps", "0", "--warmup_ratio", WARMUP]
    words += ["--image_logging_steps", "-1", "--report_to", "none", "--disable_tqdm"]
    changes = {**shared.get("model", {}), **own.get("model", {})}
    config, _ = parse(TrainConfig, [*words, "--output_dir", str(out)], prog="uvit train")
    model = resolve_model_config(config.uvit_config_file) | changes
    if changes:
        words += ["--uvit_config_file", str(out / "model.json")]
    return {"train": words, "model": model, "config": asdict(config)}


# Equal seconds


class StepTimes(io.TextIOBase):
    """A stdout that notes the CPU seconds of this process whenever training reports a step."""

    def __init__(self) -> None:
        self.text, self.marks = "", list[tuple[int, float]]()

    def write(self, text: str) -> int:
        if found := re.match(r"step (\d+)/", text):
            self.marks.append((int(found[1]), time.process_time()))
        self.text += text
        return len(text)

    def median(self) -> float:
        """Seconds of a step. The first window has what happens once, such as compiling."""
        pairs = list(zip(self.marks[1:], self.marks[2:], strict=False))
        return statistics.median((end - start) / (last - first) for (first, start), (last, end) in pairs)


def measure_step(arguments: Sequence[str]) -> float:
    """The CPU seconds of a training step of an arm, in a run that is thrown away."""
    steps, times = WINDOWS * WINDOW, StepTimes()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(times):
        words = ["--max_steps", str(steps), "--logging_steps", str(WINDOW), "--eval_steps", "-1"]
        status = run_uvit(["train", *arguments, *words, "--output_dir", folder])
    if status != 0 or len(times.marks) < 3:
        raise SystemExit(f"{times.text}\nthe arm cannot be trained: uvit train {' '.join(arguments)}")
    return times.median()


def run_arm(table: dict[str, dict[str, Row]], data: str, arm: str, options: argparse.Namespace, out: Path) -> None:
    """Train and judge an arm with each seed. What is there already is not done again."""
    folder = out / arm
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(table, data, arm, options.features, folder, options.train.split())
    measured = folder / "step.json"
    record = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None
    if record is not None and {name: record.get(name) for name in settings} != json.loads(json.dumps(settings)):
        raise SystemExit(f"{folder}: was run with other settings ({measured}); give another --output_dir")
    write_json(folder / "model.json", settings["model"])
    arguments = settings["train"]
    if record is None:
        record = {"seconds_per_step": measure_step(arguments), **settings}
        write_json(measured, record)
    steps = max(1, round(options.seconds / record["seconds_per_step"]))
    words = ["--max_steps", str(steps), "--eval_steps", str(-(-steps // POINTS))]
    for seed in options.seeds:
        run = folder / f"seed-{seed}"
        print(f"{data}, {arm}, seed {seed}: {steps} steps of {record['seconds_per_step'] * 1000:.1f} ms", flush=True)
        check(run_uvit(["train", *arguments, *words, "--seed", str(seed), "--output_dir", str(run / "run")]))
        lend(out / "reference", run / "evaluation" / "reference")
        judge = [*judge_of(table, data, arm), *options.evaluate.split()]
        target = ["--output_dir", str(run / "evaluation"), "--disable_tqdm"]
        check(run_uvit(["evaluate", str(run / "run"), *judge, *target]))
        lend(run / "evaluation" / "reference", out / "reference")


def lend(source: Path, target: Path) -> None:
    """The features of the real images are the same for all runs: the first one computes them."""
    if source.exists() and not target.exists():
        with write_folder_atomically(target) as aside:
            shutil.copytree(
                source, aside, dirs_exist_ok=True, copy_function=lambda one, other: link_or_copy(Path(one), Path(other))
            )


def check(status: int) -> None:
    if status != 0:
        raise SystemExit(status)


# The ledger


def read_rows(out: Path) -> Iterator[Row]:
    """A row for each run that was judged, and each setting of its evaluation."""
    for report in sorted(out.glob("*/seed-*/evaluation/report.json")):
        run = report.parents[1]
        step = json.loads((run.parent / "step.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((run / "run" / "config.yaml").read_text(encoding="utf-8"))
        for result in json.loads(report.read_text(encoding="utf-8"))["results"]:
            yield {
                "arm": run.parent.name,
                "seed": config["seed"],
                "setting": result["label"],
                "steps": config["max_steps"],
                "seconds_per_step": step["seconds_per_step"],
                "val_loss": validations(run / "run")[-1:],
                "scores": {score["name"]: score["value"] for score in result["scores"]},
                "better": result["scores"][0]["better"],
                "train": step["train"],
            }


def validations(run: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of a run."""
    lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if '"val_loss"' in line]
    return [(record["step"], record["val_loss"]) for record in records if record["val_loss"] is not None]


def write_ledger(out: Path, base: str = "base") -> None:
    rows = list(read_rows(out))
    write_bytes(out / "ledger.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_bytes(out / "ledger.md", ledger_table(rows, base).encode())
    for name, image in curves(out).items():
        image.save(out / f"curves-{name}.png")
    print(ledger_table(rows, base))
    print(f"{out / 'ledger.md'}; curves beside it")


def ledger_table(rows: Sequence[Row], base: str = "base") -> str:
    """Markdown: a row for each arm and setting, by the mean of the first score, the best first."""
    if not rows:
        return "nothing was judged yet\n"
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["setting"], row["arm"]].append(row)
    names = list(rows[0]["scores"])
    sign = 1 if rows[0]["better"] == "lower" else -1
    order = sorted(groups, key=lambda key: sign * statistics.fmean(values_of(groups[key], names[0])))
    lines = [
        "| arm | setting | seeds | steps | ms a step | " + " | ".join(names) + f" | val_loss | against {base} |",
        "|---" * (len(names) + 7) + "|",
    ]
    for setting, arm in order:
        group = groups[setting, arm]
        cells = [arm, setting or "-", str(len(group)), f"{group[0]['steps']:,}"]
        cells += [f"{group[0]['seconds_per_step'] * 1000:.1f}", *(spread(values_of(group, name)) for name in names)]
        cells += [spread([loss for row in group for _, loss in row["val_loss"]])]
        cells += [against(values_of(group, names[0]), values_of(groups.get((setting, base), []), names[0]))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def values_of(group: Sequence[Row], name: str) -> list[float]:
    return [row["scores"][name] for row in group]


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def against(values: Sequence[float], base: Sequence[float]) -> str:
    """The relative difference to the base, and whether it is more than noise: two standard errors, and CLEAR."""
    if not base or not statistics.fmean(base):
        return "-"
    difference = statistics.fmean(values) - statistics.fmean(base)
    share = difference / abs(statistics.fmean(base))
    if difference == 0:
        return "0"
    if min(len(values), len(base)) < 2:
        return f"{share:+.1%}, one seed"
    error = math.hypot(*(statistics.stdev(each) / math.sqrt(len(each)) for each in (values, base)))
    return f"{share:+.1%}" if abs(difference) > 2 * error and abs(share) > CLEAR else f"{share:+.1%}, within noise"


# Curves


def curves(out: Path) -> dict[str, Image.Image]:
    """Validation losses by CPU seconds, means over seeds: an image for each kind of loss, within which they compare."""
    kinds: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for measured in sorted(out.glob("*/step.json")):
        seconds = json.loads(measured.read_text(encoding="utf-8"))["seconds_per_step"]
        losses: dict[int, list[float]] = defaultdict(list)
        for run in sorted(measured.parent.glob("seed-*/run")):
            if not (run / "logs" / "metrics.jsonl").exists() or not (run / "config.yaml").exists():
                continue
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            kind = f"{config.get('path', 'vp')}-{config['prediction_type']}"
            for step, loss in validations(run):
                losses[step].append(loss)
        if losses:
            points = [(step * seconds, statistics.fmean(values)) for step, values in sorted(losses.items())]
            kinds[kind][measured.parent.name] = points
    return {kind: draw_curves(lines) for kind, lines in kinds.items()}


def draw_curves(lines: dict[str, list[tuple[float, float]]], size: tuple[int, int] = (900, 560)) -> Image.Image:
    """Lines of points (seconds, loss), with a legend."""
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(image)
    points = [point for line in lines.values() for point in line]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    x0, y0, x1, y1 = 70, 20, size[0] - 220, size[1] - 50

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = (point[0] - left) / (right - left or 1), (point[1] - low) / (high - low or 1)
        return x0 + across * (x1 - x0), y1 - up * (y1 - y0)

    draw.rectangle((x0, y0, x1, y1), outline="black")
    for i in range(5):
        second, loss = left + i / 4 * (right - left), low + i / 4 * (high - low)
        draw.text((place((second, low))[0], y1 + 6), f"{second:.4g}", "black", font, "ma")
        draw.text((x0 - 6, place((left, loss))[1]), f"{loss:.4g}", "black", font, "rm")
    draw.text(((x0 + x1) / 2, size[1] - 20), "seconds of training", "black", font, "mm")
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        draw.line([place(point) for point in line], colour, 2)
        draw.line((x1 + 12, y0 + 10 + 18 * number, x1 + 32, y0 + 10 + 18 * number), colour, 3)
        draw.text((x1 + 38, y0 + 10 + 18 * number), name, "black", font, "lm")
    return image


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("arms", nargs="*", help="default: all arms of the data set; `table` writes the ledger alone")
    parser.add_argument("--features", required=True, help="the feature store of the data set")
    parser.add_argument("--seconds", type=float, default=1260, help="of training, in CPU seconds of a process")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--train", default="", help="more flags of `uvit train`, for all arms")
    parser.add_argument("--evaluate", default="", help="more flags of `uvit evaluate`")
    parser.add_argument("--base", default="base", help="the arm that others are compared with in the ledger")
    parser.add_argument("--table", type=Path, default=TABLE, help="another ablations.yaml")
    parser.add_argument("--output_dir", type=Path, default=Path("output/ablations"))
    options = parser.parse_intermixed_args(arguments)
    table = read_table(options.table)
    if options.data not in table["data"]:
        parser.error(f"{options.data}: the data sets are {', '.join(table['data'])}")
    known = arms_of(table, options.data)
    for arm in (*options.arms, options.base):
        if arm not in (*known, "table"):
            parser.error(f"{arm}: the arms of {options.data} are {', '.join(known)}")
    out = options.output_dir / f"{options.data}-{options.seconds:g}s"
    out.mkdir(parents=True, exist_ok=True)
    for arm in options.arms or known:
        if arm != "table":
            run_arm(table, options.data, arm, options, out)
            write_ledger(out, options.base)
    if "table" in options.arms:
        write_ledger(out, options.base)


if __name__ == "__main__":
    main(sys.argv[1:])
