"""`uvit evaluate compare`: whether two reports differ by more than their spread, and whether they can be compared."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uvit.config.evaluate import EvaluateCompareConfig
from uvit.errors import UserError, differences

REPORT_FORMAT = "uvit evaluation"  # of report.json
PIXELS_SHA256 = ("reference", "pixels_sha256")
# What must be equal for two numbers to mean the same; everything else may be what is compared.
PROTOCOL = (
    ("results", 0, "images", 0, "num_images"),
    ("results", 0, "images", 0, "preparation"),
    ("results", 0, "images", 0, "lossy_files"),
    ("results", 0, "images", 0, "resolution"),
    PIXELS_SHA256,
    ("reference", "sha256"),
    ("reference", "num_images"),
    ("reference", "preparation"),
    ("prompts", "sha256"),
    ("prompts", "num_prompts"),
    ("extractors",),
    ("settings", "kid_subset_size"),
    ("settings", "kid_subsets"),
    ("settings", "nearest_k"),
)
COMPARED = ("model", "unet_sha256", "guidance_scale", "guidance_interval", "num_inference_steps", "scheduler", "ema",
            "seed", "dtype", "folder", "source")  # fmt: skip
IN_BOTH = "in the first report", "in the second"
SURE = 1.96  # standard errors; of two equal models, one pair in twenty differs by more


def compare_reports(config: EvaluateCompareConfig) -> int:
    """The command. Returns 1 if the reports cannot be compared."""
    paths = [path / "report.json" if path.is_dir() else path for path in map(Path, config.reports)]
    first, second = map(read_report, paths)
    for path, report in zip(paths, (first, second), strict=True):
        if len(report["results"]) > 1:
            label = report["results"][0]["label"]
            print(f"{path}: has {len(report['results'])} settings; the first one is compared: {label}")
    one, other = ({key: report["results"][0]["images"][0].get(key) for key in COMPARED} for report in (first, second))
    for line in differences(one, other, IN_BOTH).values():
        print(line)
    obstacles = list(not_comparable(first, second))
    for obstacle in obstacles:
        print(f"cannot be compared: {obstacle}")
    if obstacles:
        return 1
    for line in verdicts(first["results"][0]["scores"], second["results"][0]["scores"]):
        print(line)
    return 0


def read_report(path: Path) -> dict[str, Any]:
    """Raises UserError if this is no report.json."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != REPORT_FORMAT or not report["results"]:
            raise ValueError("it is another file")
        if not all(result["scores"] and result["images"] for result in report["results"]):
            raise ValueError("it has a result without scores or images")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the report.json of an evaluation ({error}); give its --output_dir") from None
    assert isinstance(report, dict)
    return report


def not_comparable(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    """Each difference that makes the scores numbers of two kinds."""
    for path in PROTOCOL:
        one, other = _at(first, path), _at(second, path)
        if path == ("reference", "sha256") and (_at(first, PIXELS_SHA256) and _at(second, PIXELS_SHA256)):
            continue  # a file of statistics, or the images themselves: the pixels decide
        if path == ("extractors",):  # those of scores that both have
            both = set(one or {}) & set(other or {})
            one, other = ({name: each[name] for name in sorted(both)} for each in (one, other))
        name = ".".join(str(key) for key in path if not isinstance(key, int)).removeprefix("results.")
        yield from differences({name: one}, {name: other}, IN_BOTH).values()


def verdicts(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each score that both reports have."""
    theirs = {score["name"]: score for score in second}
    for one in first:
        other = theirs.get(one["name"])
        if other is None:
            continue
        verdict = "the same"
        if one["value"] != other["value"]:
            first_wins = (one["value"] < other["value"]) == (one["better"] == "lower")
            verdict = f"better in the {'first' if first_wins else 'second'}; {_certainty(one, other)}"
        yield f"{one['name']}: {one['value']:.6g} and {other['value']:.6g}, {verdict}"


def _certainty(one: dict[str, Any], other: dict[str, Any]) -> str:
    gap = abs(one["value"] - other["value"])
    if "deviation" in one and "deviation" in other:
        error = math.hypot(*(each["deviation"] / math.sqrt(len(each["values"])) for each in (one, other)))
        words = "more" if gap > SURE * error else "not more"
        spread = f"{SURE} standard errors are {SURE * error:.3g}"
        return f"the difference {gap:.3g} is {words} than the repeats explain ({spread})"
    if all("interval" in each and "deviation" not in each for each in (one, other)):
        apart = one["interval"][0] > other["interval"][1] or other["interval"][0] > one["interval"][1]
        return f"their 95% intervals {'do not overlap' if apart else 'overlap, so it may be chance'}"
    return "whether that is chance cannot be said: evaluate both with --repeats 3"


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content
