"""`uvit evaluate`: images of a model, or any images, measured and compared with real ones.

    list_prompts, list_measured, open_reference   what is measured, and what it is compared with
    run_tasks                                     images -> features on disk, in chunks that processes share
    score                                         features -> scores, and what they depend on
    write_report, write_sheets, write_neighbours  report.json, report.md, contact sheets

Every stage resumes: images and features are files that are complete or not there.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uvit.config.evaluate import NEED_REFERENCE, PROTOCOL_OF_FEATURES, EvaluateConfig
from uvit.config.sharding import resolve_shard
from uvit.errors import UserError
from uvit.evaluate.attributes import accuracy_table, scene_kind
from uvit.evaluate.check_flags import check_flags
from uvit.evaluate.features import (
    FeatureSet,
    PerImage,
    all_done,
    describe_images,
    extract_features,
    load_features,
    num_own_images,
)
from uvit.evaluate.frechet import FeatureStatistics
from uvit.evaluate.generate import GeneratedImages, Model, folder_name, is_model, open_model, trained_on
from uvit.evaluate.image_sets import ImageSet, open_images
from uvit.evaluate.measure import (
    FRECHET,
    ImageFeatures,
    Score,
    build_extractors,
    by_name,
    check_metrics,
    comparing,
    compute_scores,
)
from uvit.evaluate.prompts import Prompt, list_prompts, prompts_lines, prompts_sha256
from uvit.evaluate.reference import describe_extractor, describe_statistics, score_statistics
from uvit.evaluate.sheets import write_neighbours, write_sheets
from uvit.evaluate.statistics_file import SavedStatistics, check_same_features, is_statistics, read_statistics
from uvit.evaluate.sweep import best_setting, list_settings, pareto_plot
from uvit.evaluate.write_report import (
    command_line,
    effective_settings,
    environment,
    notes_on,
    notes_on_protocol,
    score_table,
    summarise,
    write_report,
)
from uvit.images import save_png
from uvit.io import write_bytes, write_json
from uvit.progress import Progress
from uvit.sample.files import check_writable
from uvit.sample.schedulers import DEFAULT_SCHEDULER, scheduler_names

MIN_FOR_HALVES = 4  # prompts of a sweep: the best setting is chosen on one half, and half a covariance needs two


@dataclass(frozen=True)
class Measured:
    """One setting with one seed, or the images of --model: where its features are."""

    label: str  # of the setting; empty if there is only one
    folder: Path
    images: ImageSet


@dataclass(frozen=True)
class Task:
    """Images, and the features to compute of them."""

    images: ImageSet
    prompts: Sequence[Prompt]
    extractors: Sequence[PerImage]
    folder: Path


def evaluate(config: EvaluateConfig) -> None:
    """The command. Raises UserError if something is missing, cannot be read, or gives no finite score."""
    if is_model(config.model) and not (config.protocol or config.prompts or config.reference or config.metrics):
        config = replace(config, protocol="shapes")
    given, config = config, with_own_features(config).resolved()
    check_metrics(config)
    check_flags(given, config)
    if is_statistics(config.model):
        evaluate_statistics(given, config)
        return
    part, num_parts = resolve_shard(config.shard)
    folder = Path(config.output_dir)
    check_output(config)
    clock = Stopwatch()

    with clock("start"):
        extractors = build_extractors(config)
        prompts = []
        if config.prompts:
            order = config.prompt_order or "listed"
            prompts = list_prompts(config.prompts, config.split, config.max_prompts, order)
        models = open_models(config, prompts)
    if models and not given.scheduler:
        given, config = with_solver_of_path(given, config, next(iter(models.values())))
    measured = list(list_measured(config, prompts, models))
    resolution = measured[0].images.description.get("resolution")
    reference = open_reference(config, extractors, config.resolution or (resolution[0] if resolution else None))

    every = list(by_name(extractors, config.metrics).values())
    tasks = [Task(each.images, prompts, every, each.folder / "features") for each in measured]
    real_images = None if isinstance(reference, SavedStatistics) else reference
    if real_images is not None:
        compared = list(by_name(extractors, comparing(config)).values())
        tasks.append(Task(real_images, [], compared, folder / "reference"))
    with clock("images and features"):
        run_tasks(config, tasks, part, num_parts)
    with only_one(folder):
        if not all(all_done(each.images, each.extractors, each.folder) for each in tasks):
            print(f"part {part} of {num_parts} is done; the process that finishes last writes the report")
            return
        with clock("scores"):
            report = score(config, measured, reference, extractors, prompts)
        report["notes"] += notes_on_protocol(config, measured[0].images.description, prompts)
        report = {
            "command": command_line(given),
            "protocol": {"name": given.protocol, "changed": given.protocol_changes()} if given.protocol else {},
            **report,
            "settings": effective_settings(config),
            "environment": environment(),
        }
        write_report(folder, report)
        write_json(folder / "seconds.json", clock.seconds)  # apart, so that equal evaluations write equal reports
        if prompts:
            seeds = dict.fromkeys(each.images.description["seed"] for each in measured if is_model(config.model))
            write_bytes(folder / "prompts.jsonl", prompts_lines(prompts, list(seeds)).encode())
        write_sheets(folder, measured[0].images, prompts)
        if real_images is not None:
            extractor = extractors.get("retrieval", tasks[-1].extractors[0])
            features, real = (load_features(each.images, extractor, each.folder) for each in (tasks[0], tasks[-1]))
            centered = config.retrieval_cosine == "centered"
            write_neighbours(folder, measured[0].images, features, real_images, real, centered)
    print("\n".join(summary(config, report, len(prompts))))
    print("seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in clock.seconds.items()))
    print(f"report: {folder / 'report.md'}; contact sheet: {folder / 'contact_sheet.png'}")


def with_own_features(config: EvaluateConfig) -> EvaluateConfig:
    """With the features that the run was trained on as prompts and reference, where the protocol takes these."""
    if config.protocol != PROTOCOL_OF_FEATURES:
        return config
    needs_reference = set(config.resolved().metrics) & NEED_REFERENCE
    missing = [name for name in ("prompts", *["reference"] * bool(needs_reference)) if getattr(config, name) is None]
    features = trained_on(config.model) if missing else None
    if missing and features is None:
        flags = " and ".join(f"--{name}" for name in missing)
        raise UserError(
            f"--protocol {config.protocol}: {config.model} does not record the features that it was trained on; give "
            f"{flags}, such as the feature store"
        )
    return replace(config, **dict.fromkeys(missing, features))


def evaluate_statistics(given: EvaluateConfig, config: EvaluateConfig) -> None:
    """Compare two files of statistics, and write the report."""
    check_output(config)
    result, one, other = score_statistics(config)
    first, second = describe_statistics(one), describe_statistics(other)
    report = {
        "command": command_line(given),
        "results": [{"label": "", "scores": summarise([[result]]), "images": [first]}],
        "images": first,
        "reference": second,
        "notes": [] if result.name != "fid" or "pixels_sha256" in first else ["The files do not say what made them."],
        "extractors": describe_extractor(one) or describe_extractor(other),
        "settings": effective_settings(config),
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


def open_models(config: EvaluateConfig, prompts: Sequence[Prompt]) -> dict[str, Model]:
    """The model with each of the weights to measure, by their names; empty if --model holds images."""
    if not is_model(config.model):
        return {}
    if not prompts:
        raise UserError(f"{config.model}: is a model, which generates an image for each prompt; give --prompts")
    return {weights: open_model(config.model, weights, config.device, config.dtype) for weights in config.weights()}


def with_solver_of_path(
    given: EvaluateConfig, config: EvaluateConfig, model: Model
) -> tuple[EvaluateConfig, EvaluateConfig]:
    """Both with the default solver if that of the protocol cannot sample the model's path, as `official` a linear one.

    The report then has it among the flags that changed the protocol.
    """
    path, [name] = model.pipeline.conventions.path, config.scheduler
    if name in scheduler_names(path):
        return given, config
    print(f"--protocol {config.protocol}: {name} cannot sample a model of path {path}; {DEFAULT_SCHEDULER} does")
    return replace(given, scheduler=(DEFAULT_SCHEDULER,)), replace(config, scheduler=(DEFAULT_SCHEDULER,))


def list_measured(config: EvaluateConfig, prompts: Sequence[Prompt], models: dict[str, Model]) -> Iterator[Measured]:
    """What to measure: each setting with each seed, or the images of --model."""
    folder = Path(config.output_dir)
    if not models:
        images = open_images(config, config.model, "model", config.resolution)
        if prompts and len(prompts) != len(images):
            raise UserError(
                f"--prompts {config.prompts}: has {len(prompts)} prompts, and {config.model} {len(images)} images; "
                "each image, in order of its name, needs its prompt"
            )
        yield Measured("", folder, images)
        return
    settings, varied = list_settings(config)
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
    if is_statistics(config.reference):
        saved = read_statistics(Path(config.reference))
        for metric, extractor in extractors.items():
            if metric in FRECHET and isinstance(extractor, ImageFeatures):
                check_same_features(saved, extractor.network)
        return saved
    if is_model(config.reference):
        raise UserError(
            f"--reference {config.reference}: is a model; give images, such as the folder of those that it generated"
        )
    return open_images(config, config.reference, "reference", resolution)


def run_tasks(config: EvaluateConfig, tasks: Sequence[Task], part: int, num_parts: int) -> None:
    """Generate or load this process's part of the images, and compute their features."""
    silent = int(os.environ.get("RANK", "0")) > 0
    total = sum(num_own_images(each.images, part, num_parts) for each in tasks)
    bar = not (config.disable_tqdm or silent)
    with Progress("evaluate", total, "image", bar=bar, lines=not silent) as progress:
        for each in tasks:
            extract_features(each.images, each.prompts, each.extractors, each.folder, part, num_parts, progress)


# Scores


def score(
    config: EvaluateConfig,
    measured: Sequence[Measured],
    reference: ImageSet | SavedStatistics | None,
    extractors: dict[str, PerImage],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """The scores of everything measured, and what they depend on, as the report has them."""
    unique = by_name(extractors, config.metrics)
    real, described = load_reference(config, reference, extractors)
    is_sweep = len({each.label for each in measured}) > 1
    has_halves = is_sweep and len(prompts) >= MIN_FOR_HALVES
    results: dict[str, dict[str, Any]] = {}
    halves: dict[str, tuple[list[Score], list[Score]]] = {}
    for each in measured:
        features = {name: load_features(each.images, unique[name], each.folder / "features") for name in unique}
        result = results.setdefault(each.label, {"repeats": [], "images": []})
        result["repeats"].append(compute_scores(config, extractors, features, real, prompts))
        result["images"].append(describe_images(each.images, next(iter(features.values()))))
        if has_halves and each.label not in halves:
            first, second = (compute_scores(config, extractors, features, real, prompts, half) for half in (0, 1))
            halves[each.label] = (first, second)
    rows = [
        {"label": label, "scores": summarise(result["repeats"]), "images": result["images"]}
        for label, result in results.items()
    ]
    report: dict[str, Any] = {"results": rows, "images": rows[0]["images"][0], "reference": described}
    if has_halves:
        report["best"] = best_setting(
            [first for first, _ in halves.values()], [second for _, second in halves.values()]
        )
    if is_sweep:
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


def load_reference(
    config: EvaluateConfig, reference: ImageSet | SavedStatistics | None, extractors: dict[str, PerImage]
) -> tuple[dict[str, FeatureSet | FeatureStatistics], dict[str, Any]]:
    """({name of the extractor: features of the real images, or their statistics}, what the report says of them)"""
    compared = by_name(extractors, comparing(config))
    if reference is None:
        return {}, {}
    if isinstance(reference, SavedStatistics):
        return dict.fromkeys(compared, reference.statistics), describe_statistics(reference)
    real = {
        name: load_features(reference, each, Path(config.output_dir) / "reference") for name, each in compared.items()
    }
    return dict(real), describe_images(reference, next(iter(real.values())))


def summary(config: EvaluateConfig, report: dict[str, Any], num_prompts: int) -> list[str]:
    """What the command prints."""
    if config.metrics == ("attributes",) and len(report["results"]) == 1:
        values = {each["name"]: each["value"] for each in report["results"][0]["scores"]}
        return [accuracy_table(values, scene_kind(config), num_prompts, config.split or "heldout")]
    return [*score_table(report), *report["notes"]]


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
