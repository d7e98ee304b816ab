"""Flags that would have no effect: they are refused, so that no report names a setting that nothing used."""

from collections.abc import Iterator
from dataclasses import fields

from uvit.config.evaluate import DEFAULTS, EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.generate import is_model
from uvit.evaluate.measure import network_of
from uvit.evaluate.statistics_file import is_statistics
from uvit.evaluate.write_report import FLAGS_WITHOUT_EFFECT

OF_SAMPLING = (
    "guidance_scale", "num_inference_steps", "scheduler", "guidance_interval", "ema", "ema_lengths", "seed", "repeats",
    "batch_size", "dtype",
)  # fmt: skip
OF_NETWORKS = {
    "inception_input": "inception",
    "inception_weights": "inception",
    "clip_name_or_path": "clip",
    "cmmd_name_or_path": "cmmd",
    "dinov2_name_or_path": "dinov2",
    "feature_extractor": "own",
}
OF_METRICS = {"nearest_k": "prdc", "kid_subsets": "kid", "kid_subset_size": "kid"}
OF_STATISTICS = ("model", "output_dir", "reference", "metrics", "feature_extractor", "device", *FLAGS_WITHOUT_EFFECT)


def check_flags(given: EvaluateConfig | EvaluateStatisticsConfig, config: EvaluateConfig) -> None:
    """Raises UserError for the first flag that has no effect.

    Args:
        given: the flags as they were given: those that differ from their defaults.
        config: all settings, with those of the protocol.
    """
    default = {field.name: field.default for field in fields(given)}
    for name, reason in _without_effect(config):
        if name in default and (value := getattr(given, name)) not in (default[name], DEFAULTS.get(name)):
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name} {text}: has no effect, because {reason}; leave it out")


def _without_effect(config: EvaluateConfig) -> Iterator[tuple[str, str]]:
    """(a flag that has no effect with these settings, why)"""
    if is_statistics(config.model):
        for field in fields(config):
            if field.name not in OF_STATISTICS:
                yield field.name, f"{config.model} holds statistics, and two files of these are compared as they are"
        return
    generates = is_model(config.model)
    if not generates:
        yield from ((name, f"{config.model} is no pipeline, run or checkpoint to sample from") for name in OF_SAMPLING)
    if config.prompts is None:
        yield from ((name, "there are no --prompts") for name in ("max_prompts", "prompt_order"))
    compares_images = config.reference is not None and not is_statistics(config.reference)
    if generates and not compares_images:
        for name in ("image_folder", "crop", "resize", "icc", *["resolution"] * (config.protocol is None)):
            yield name, "no real images are read"
    elif not generates and config.resolution is None:
        yield from ((name, "images stay as they are without --resolution") for name in ("crop", "resize"))
    networks = {network_of(metric, config) for metric in config.metrics}
    metrics = " ".join(config.metrics)
    for name, network in OF_NETWORKS.items():
        if network not in networks:
            yield name, f"{metrics} uses another network"
    for name, metric in OF_METRICS.items():
        if metric not in config.metrics:
            yield name, f"it is for {metric}, not {metrics}"
    if "retrieval" not in config.metrics and not compares_images:  # neighbours.png has it too
        yield "retrieval_cosine", f"it is for --metrics retrieval, not {metrics}"
