"""`uvit evaluate`: images of a model, or any images, measured and compared with real ones.

    list_prompts, open_images, GeneratedImages    what is measured, and what with
    extract_features                              images -> features on disk, in chunks that processes share
    compute_scores                                features -> scores
    write_report                                  report.json, report.md, contact sheets

Every stage resumes: images and features are files that are complete or not there.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uvit.config.evaluate import EvaluateConfig
from uvit.config.sharding import resolve_shard
from uvit.errors import UserError
from uvit.evaluate.attributes import accuracy_table, attribute_sheet, scene_kind
from uvit.evaluate.features import FeatureSet, PerImage, all_done, extract_features, load_features
from uvit.evaluate.generate import GeneratedImages, folder_name, is_model, open_model
from uvit.evaluate.image_sets import ImageSet, open_images
from uvit.evaluate.measure import (
    FRECHET,
    ImageFeatures,
    Score,
    build_extractors,
    check_metrics,
    comparing,
    compute_scores,
)
from uvit.evaluate.prompts import Prompt, list_prompts, prompts_lines, prompts_sha256
from uvit.evaluate.reference import describe_statistics, score_statistics
from uvit.evaluate.retrieval import nearest_images
from uvit.evaluate.statistics_file import SavedStatistics, check_same_features, read_statistics
from uvit.evaluate.sweep import best_setting, list_settings, pareto_plot
from uvit.evaluate.write_report import (
    FLAGS_WITHOUT_EFFECT,
    command_line,
    environment,
    notes_on,
    notes_on_protocol,
    score_table,
    summarise,
    write_report,
)
from uvit.images import contact_sheet, save_png
from uvit.io import write_bytes, write_json
from uvit.progress import Progress
from uvit.sample.files import check_writable

SHEET_IMAGES = 64
MAX_NEIGHBOUR_ROWS = 24


@dataclass(frozen=True)
class Measured:
    """One setting with one seed, or the images of --model: where its features are."""

    label: str  # of the setting; empty if there is only one
    folder: Path
    images: ImageSet


def evaluate(config: EvaluateConfig) -> None:
    """The command. Raises UserError if something is missing, cannot be read, or gives no finite score."""
    if is_model(config.model) and not (config.protocol or config.prompts or config.reference or config.metrics):
        config = EvaluateConfig(**{**vars(config), "protocol": "shapes"})
    given, config = config, config.resolved()
    check_metrics(config)
    if config.model.endswith(".npz"):
        evaluate_statistics(config)
        return
    part, num_parts = resolve_shard(config.shard)
    folder = Path(config.output_dir)
    check_output(config)
    clock = Stopwatch()
    with clock("start"):
        extractors = build_extractors(config)
        prompts = [] if config.prompts is None else list_prompts(
            config.prompts, config.split, config.max_prompts
        )  # fmt: skip
    measured = list(list_measured(config, prompts, clock))
    resolution = measured[0].images.description.get("resolution")
    reference = open_reference(config, extractors, config.resolution or (resolution[0] if resolution else None))

    unique = {extractor.name: extractor for extractor in extractors.values()}
    shared = list({extractors[metric].name: extractors[metric] for metric in comparing(config)}.values())
    silent = int(os.environ.get("RANK", "0")) > 0
    jobs = [(each.images, prompts, list(unique.values()), each.folder / "features") for each in measured]
    if reference is not None and not isinstance(reference, SavedStatistics):
        jobs.append((reference, [], shared, folder / "reference"))
    total = sum(len(images) for images, *_ in jobs) // num_parts
    with (
        Progress("evaluate", total, "image", bar=not (config.disable_tqdm or silent), lines=not silent) as progress,
        clock("images and features"),
    ):
        for images, its_prompts, its_extractors, its_folder in jobs:
            extract_features(images, its_prompts, its_extractors, its_folder, part, num_parts, progress)
    with only_one(folder):
        if not all(all_done(images, its_extractors, its_folder) for images, _, its_extractors, its_folder in jobs):
            print(f"part {part} of {num_parts} is done; the process that finishes last writes the report")
            return
        with clock("scores"):
            report = score(config, measured, reference, extractors, prompts)
        report["notes"] += notes_on_protocol(config, measured[0].images.description, prompts)
        report = {
            "command": command_line(given),
            "protocol": {"name": given.protocol, "changed": given.protocol_changes()} if given.protocol else {},
            **report,
            "settings": {name: value for name, value in asdict(config).items() if name not in FLAGS_WITHOUT_EFFECT},
            "environment": environment(),
        }
        write_report(folder, report)
        write_json(folder / "seconds.json", clock.seconds)  # apart, so that equal evaluations write equal reports
        if prompts:
            seeds = dict.fromkeys(each.images.description["seed"] for each in measured if is_model(config.model))
            write_bytes(folder / "prompts.jsonl", prompts_lines(prompts, list(seeds)).encode())
        write_sheets(folder, measured, prompts)
        compared = comparing(config)
        if compared and reference is not None and not isinstance(reference, SavedStatistics):
            write_neighbours(folder, measured[0], reference, extractors.get("retrieval", extractors[compared[0]]))
    print("\n".join(summary(config, report, len(prompts))))
    print("seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in clock.seconds.items()))
    print(f"report: {folder / 'report.md'}; contact sheet: {folder / 'contact_sheet.png'}")


def evaluate_statistics(config: EvaluateConfig) -> None:
    """Compare two files of statistics, and write the report."""
    check_output(config)
    result, first, second = score_statistics(config)
    report = {
        "command": command_line(config),
        "results": [{"label": "", "scores": summarise([[result]]), "images": [first]}],
        "images": first,
        "reference": second,
        "notes": [] if result.name != "fid" or "pixels_sha256" in first else ["The files do not say what made them."],
        "environment": environment(),
    }
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    write_report(Path(config.output_dir), report)
    print("\n".join([*score_table(report), f"report: {Path(config.output_dir) / 'report.md'}"]))


def check_output(config: EvaluateConfig) -> None:
    """Raises UserError if --output_dir cannot be written, or lies among the images, of which it would become one."""
    folder = Path(config.output_dir)
    check_writable(folder, f"--output_dir {folder}")
    for images in (config.model, config.reference):
        place = Path(images or "nothing").resolve()
        if images is None or not place.is_dir() or is_model(images):
            continue
        if place in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"--output_dir {folder}: lies in {images}, whose images are read; choose another folder")


def list_measured(config: EvaluateConfig, prompts: Sequence[Prompt], clock: "Stopwatch") -> Iterator[Measured]:
    """What to measure: each setting with each seed, or the images of --model."""
    folder = Path(config.output_dir)
    if not is_model(config.model):
        images = open_images(config, config.model, "model", config.resolution)
        if prompts and len(prompts) != len(images):
            raise UserError(
                f"--prompts {config.prompts}: has {len(prompts)} prompts, and {config.model} {len(images)} images; "
                "each image, in order of its name, needs its prompt"
            )
        yield Measured("", folder, images)
        return
    if not prompts:
        raise UserError(f"{config.model}: is a model, and generates images from --prompts")
    settings, varied = list_settings(config)
    with clock("start"):
        models = {ema: open_model(config.model, ema, config.device, config.dtype) for ema in config.ema}
    for setting in settings:
        for repeat in range(config.repeats):
            words = [folder_name(setting.label(varied))] if varied else []
            words += [f"repeat-{repeat}"] if config.repeats > 1 else []
            place = folder.joinpath(*words)
            seed = config.seed + repeat * len(prompts)
            images = GeneratedImages(
                models[setting.ema], prompts, setting, seed, int(config.batch_size or 8), config.dtype, place / "images"
            )
            yield Measured(setting.label(varied), place, images)


def open_reference(
    config: EvaluateConfig, extractors: dict[str, PerImage], resolution: int | None
) -> ImageSet | SavedStatistics | None:
    """Real images at the resolution of the generated ones, or their statistics."""
    if config.reference is None:
        return None
    if config.reference.lower().endswith(".npz"):
        saved = read_statistics(Path(config.reference))
        for metric, writer in extractors.items():
            if metric in FRECHET and isinstance(writer, ImageFeatures):
                check_same_features(saved, writer.extractor)
        return saved
    if is_model(config.reference):
        raise UserError(f"--reference {config.reference}: is a model; give images, or a folder that it generated")
    return open_images(config, config.reference, "reference", resolution)


# Scores


def score(
    config: EvaluateConfig,
    measured: Sequence[Measured],
    reference: ImageSet | SavedStatistics | None,
    extractors: dict[str, PerImage],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """The scores of everything measured, and what they depend on, as the report has them."""
    unique = {extractor.name: extractor for extractor in extractors.values()}
    real: dict[str, Any] = {}
    described: dict[str, Any] = {}
    if isinstance(reference, SavedStatistics):
        real = dict.fromkeys(unique, reference.statistics)
        described = describe_statistics(reference)
    elif reference is not None:
        folder = Path(config.output_dir) / "reference"
        shared = {extractors[metric].name: extractors[metric] for metric in comparing(config)}
        real = {name: load_features(reference, each, folder) for name, each in shared.items()}
        described = _described(reference, next(iter(real.values())))
    results: dict[str, dict[str, Any]] = {}
    halves: dict[str, tuple[list[Score], list[Score]]] = {}
    for each in measured:
        features = {name: load_features(each.images, unique[name], each.folder / "features") for name in unique}
        result = results.setdefault(each.label, {"repeats": [], "images": []})
        result["repeats"].append(compute_scores(config, extractors, features, real, prompts))
        result["images"].append(_described(each.images, next(iter(features.values()))))
        if len({one.label for one in measured}) > 1 and each.label not in halves:
            first, second = (compute_scores(config, extractors, features, real, prompts, half) for half in (0, 1))
            halves[each.label] = (first, second)
    rows = [
        {"label": label, "scores": summarise(result["repeats"]), "images": result["images"]}
        for label, result in results.items()
    ]
    report: dict[str, Any] = {"results": rows, "images": rows[0]["images"][0], "reference": described}
    if halves:
        report["best"] = best_setting(
            [first for first, _ in halves.values()], [second for _, second in halves.values()]
        )
        scores = [result["repeats"][0] for result in results.values()]
        if len(scores[0]) > 1:
            plot = pareto_plot(list(results), [row[0] for row in scores], [row[1] for row in scores])
            save_png(plot, Path(config.output_dir) / "pareto.png")
    names = [each["name"] for each in rows[0]["scores"]]
    report["notes"] = notes_on(report["images"], described, len(measured[0].images), names)
    report["extractors"] = {name: dict(each.description) for name, each in unique.items()}
    if prompts:
        report["prompts"] = {
            "from": config.prompts, "num_prompts": len(prompts), "sha256": prompts_sha256(prompts),
        }  # fmt: skip
    return report


def _described(images: ImageSet, features: FeatureSet) -> dict[str, Any]:
    problems = {"problems": features.problems} if features.problems else {}
    return {**images.description, "pixels_sha256": features.pixels_sha256, **problems}


def summary(config: EvaluateConfig, report: dict[str, Any], num_prompts: int) -> list[str]:
    """What the command prints."""
    if config.metrics == ("attributes",) and len(report["results"]) == 1:
        values = {each["name"]: each["value"] for each in report["results"][0]["scores"]}
        return [accuracy_table(values, scene_kind(config), num_prompts, config.split or "heldout")]
    return [*score_table(report), *report["notes"]]


# Contact sheets


def write_sheets(folder: Path, measured: Sequence[Measured], prompts: Sequence[Prompt]) -> None:
    """The first images of the first setting; and for prompts with categories, a sheet for each."""
    images = measured[0].images
    if prompts and prompts[0].scene is not None:
        shown = _load(images, range(min(len(images), SHEET_IMAGES)))
        save_png(attribute_sheet(prompts[: len(shown)], shown), folder / "contact_sheet.png")
        return
    _save_sheet(images, list(range(len(images))), prompts, folder / "contact_sheet.png")
    categories = list(dict.fromkeys(prompt.category for prompt in prompts if prompt.category))
    for number, category in enumerate(categories):  # numbered: names of folders may be equal, or empty
        rows = [row for row, prompt in enumerate(prompts) if prompt.category == category]
        _save_sheet(images, rows, prompts, folder / "sheets" / f"{number:02d}-{folder_name(category)[:60]}.png")


def write_neighbours(folder: Path, measured: Measured, reference: ImageSet, extractor: PerImage) -> None:
    """The first generated images, each with the real ones nearest to it: copies show what was memorised."""
    mine = load_features(measured.images, extractor, measured.folder / "features")
    real = load_features(reference, extractor, folder / "reference")
    nearest, cosines = nearest_images(mine.tensor("features")[:MAX_NEIGHBOUR_ROWS], real.tensor("features"))
    shown, labels = list[Image.Image](), list[str]()
    for row, its_nearest, its_cosines in zip(mine.rows, nearest.tolist(), cosines.tolist(), strict=False):
        shown += _load(measured.images, [int(row)]) + _load(reference, [int(real.rows[i]) for i in its_nearest])
        labels += ["generated", *(f"cosine {cosine:.3f}" for cosine in its_cosines)]
    save_png(contact_sheet(shown, labels, columns=1 + nearest.shape[1]), folder / "neighbours.png")


def _save_sheet(images: ImageSet, rows: Sequence[int], prompts: Sequence[Prompt], path: Path) -> None:
    rows = rows[:SHEET_IMAGES]
    labels = [prompts[row].text for row in rows] if prompts else None
    if shown := _load(images, rows):
        save_png(contact_sheet(shown, labels), path)


def _load(images: ImageSet, rows: Sequence[int]) -> list[Image.Image]:
    """Images by their positions; those that cannot be read are grey."""
    found = []
    with Progress("sheet", len(rows), "image", bar=False, lines=False) as progress:
        for row in rows:
            loaded = images.load(row, row + 1, progress)
            found.append(
                Image.fromarray(np.asarray(loaded.pixels[0])) if loaded.ids else Image.new("RGB", (64, 64), "grey")
            )
    return found


# Time and locks


class Stopwatch:
    """Seconds by name: `with clock("scores"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two processes may finish at the same time; one writes the report after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
