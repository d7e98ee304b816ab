"""The report of an evaluation: report.json for programs, report.md for people."""

import dataclasses
import importlib.metadata
import math
import platform
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uvit import __version__
from uvit.config.evaluate import PROTOCOL_PROMPTS, PROTOCOL_PROMPTS_SHA256, PROTOCOLS, EvaluateConfig
from uvit.errors import UserError
from uvit.evaluate.compare import REPORT_FORMAT
from uvit.evaluate.measure import SMALL_SET, Score
from uvit.evaluate.prompts import Prompt, prompts_sha256
from uvit.io import write_bytes, write_json

REPORT_VERSION = 1
FLAGS_WITHOUT_EFFECT = ("shard", "disable_tqdm")  # so that shared work gives the same report
SHOWN_PROBLEMS = 10  # in report.md; report.json has all
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")


def environment() -> dict[str, str]:
    """The versions and the machine that made the numbers."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"uvit": __version__, "python": platform.python_version(), **versions, "cpu": platform.machine(), "gpu": gpu}


def command_line(config: EvaluateConfig) -> str:
    """The command that runs the evaluation again."""
    words = ["uvit", "evaluate", config.model]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("model", *FLAGS_WITHOUT_EFFECT) and value != field.default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def effective_settings(config: EvaluateConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FLAGS_WITHOUT_EFFECT}


def summarise(repeats: Sequence[Sequence[Score]]) -> list[dict[str, Any]]:
    """The scores of one setting: the mean over its repeats, their standard deviation (n - 1), and every value.

    The details are means as well. The interval of a single repeat is none of the mean, so several have no interval.
    """
    summary = []
    for scores in zip(*repeats, strict=True):
        first, values = scores[0], [score.value for score in scores]
        row: dict[str, Any] = {"name": first.name, "value": statistics.fmean(values), "better": first.better}
        if len(values) > 1:
            row |= {"deviation": statistics.stdev(values), "values": values}
        elif first.low is not None:
            row["interval"] = [first.low, first.high]
        if first.details:
            row["details"] = {name: statistics.mean(score.details[name] for score in scores) for name in first.details}
        summary.append(row)
    return summary


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.md. Raises UserError if there is a NaN or an infinity in it."""
    if bad := _not_finite(report, "report"):
        raise UserError(f"{bad} is NaN or infinite; nothing was written")
    content = {"format": REPORT_FORMAT, "version": REPORT_VERSION, **report}
    write_bytes(folder / "report.md", markdown(content).encode())
    write_json(folder / "report.json", content)


def _not_finite(value: Any, where: str) -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((bad for key, item in items if (bad := _not_finite(item, f"{where}.{key}"))), "")


def markdown(report: dict[str, Any]) -> str:
    """The report as text: scores first, then everything that they depend on."""
    lines = ["# Evaluation", "", f"`{report['command']}`", ""]
    lines += [*score_table(report), ""]
    if best := report.get("best"):
        label = report["results"][best["setting"]]["label"]
        lines += [
            f"Best {best['score']} on one half of the prompts: {label}. There it is "
            f"{best['value_on_the_half_that_chose']:.6g}; on the other half, which did not choose, "
            f"{best['value_on_the_other_half']:.6g}.",
            "",
        ]
    lines += [f"- {note}" for note in report["notes"]] + [""] * bool(report["notes"])
    for title in ("protocol", "images", "reference", "prompts", "extractors", "environment"):
        if report.get(title):
            lines += [f"## {title.capitalize()}", "", *_rows(report[title]), ""]
    return "\n".join(lines)


def score_table(report: dict[str, Any]) -> list[str]:
    """A row for each setting, a column for each score."""
    results = report["results"]
    names = [score["name"] for score in results[0]["scores"]]
    lines = ["| setting | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        cells = []
        for score in result["scores"]:
            cell = f"{score['value']:.6g}"
            if "deviation" in score:
                cell += f" ± {score['deviation']:.2g} ({len(score['values'])} repeats)"
            elif "interval" in score:
                low, high = score["interval"]
                cell += f" (95%: {low:.6g} to {high:.6g})"
            cells.append(cell)
        lines.append(f"| {result['label'] or '-'} | " + " | ".join(cells) + " |")
    return lines


def _rows(content: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in content.items():
        if key == "problems":
            shown = [problem["message"] for problem in value[:SHOWN_PROBLEMS]]
            shown += [f"and {len(value) - len(shown):,} more"] * (len(value) > len(shown))
            lines += [f"{indent}- {key}:", *(f"{indent}  - {message}" for message in shown)]
        elif isinstance(value, dict) and value:
            lines += [f"{indent}- {key}:", *_rows(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {key}: {value if not isinstance(value, float) else format(value, '.6g')}")
    return lines


def notes_on(images: dict[str, Any], reference: dict[str, Any], num_images: int, names: Sequence[str]) -> list[str]:
    """What a reader of the numbers must know."""
    notes = []
    distances = [name for name in names if name.startswith(("fid", "fd-"))]
    if distances and num_images < SMALL_SET:
        are = "is" if len(distances) == 1 else "are"
        notes.append(
            f"{' and '.join(distances)} of {num_images:,} images {are} too large by a bias that falls as 1/n. Compare "
            "only with as many images, or use `for_infinitely_many_images` in report.json."
        )
    if reference and images.get("pixels_sha256") == reference.get("pixels_sha256", "none"):
        notes.append("The images and the reference are the same images.")
    if images.get("num_truncated_prompts"):
        notes.append(
            f"{images['num_truncated_prompts']:,} prompts have more tokens than the model reads, and are cut off."
        )
    if images.get("lossy_files"):
        notes.append(
            f"{images['lossy_files']:,} files of the images are JPEG or WebP, whose compression moves features; save "
            "images as PNG."
        )
    for what, described in (("images", images), ("reference", reference)):
        if described.get("problems"):
            first = described["problems"][0]["message"]
            notes.append(f"{len(described['problems']):,} of the {what} could not be read and are left out: {first}")
    return notes


def notes_on_protocol(config: EvaluateConfig, images: dict[str, Any], prompts: Sequence[Prompt]) -> list[str]:
    """Where the prompts or the model are not those of the protocol."""
    if config.protocol is None:
        return []
    notes, (height, width) = [], images.get("resolution", (config.resolution, config.resolution))
    wanted = PROTOCOL_PROMPTS_SHA256.get(config.protocol)
    number = PROTOCOLS[config.protocol]["max_prompts"]
    if (wanted is not None and prompts_sha256(prompts) != wanted) or (number is not None and number != len(prompts)):
        notes.append(
            f"These {len(prompts):,} prompts are not those of the protocol {config.protocol}"
            f"{f' (SHA-256 {wanted[:8]}...)' if wanted else f', which has {number:,}'}. Numbers of others cannot be "
            f"compared with these. It takes {PROTOCOL_PROMPTS[config.protocol]}."
        )
    if config.resolution is not None and (height, width) != (config.resolution, config.resolution):
        notes.append(f"The model generates {width} x {height} pixels; the protocol is one of {config.resolution}.")
    return notes
