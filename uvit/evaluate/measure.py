"""From features to scores: which extractor a metric needs, and how its score is computed.

Names say what was computed: `fid` is the distance of the published Inception alone; with any other network it is
`fd-` and the network's name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from uvit.config.evaluate import NEED_PROMPTS, NEED_REFERENCE, PROTOCOL_PROMPTS, EvaluateConfig
from uvit.device import pick_device
from uvit.errors import UserError
from uvit.evaluate.attributes import AttributeReader, scene_kind
from uvit.evaluate.extractors import (
    Extractor,
    clip_extractor,
    cmmd_extractor,
    dinov2_extractor,
    inception_extractor,
    own_extractor,
)
from uvit.evaluate.features import FeatureSet, PerImage
from uvit.evaluate.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_at_infinity,
    statistics_of,
)
from uvit.evaluate.kernel_distances import cmmd, kid_interval, kid_of_subsets
from uvit.evaluate.neighbours import precision_recall_density_coverage
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.retrieval import NEAREST, retrieval_ranks
from uvit.evaluate.scores import clip_score, clip_similarities, inception_score, mean_interval

FRECHET = ("fid", "fd", "fd_dinov2")
SMALL_SET = 10_000  # images, below which the bias of a Frechet distance is said


@dataclass(frozen=True)
class Score:
    """One number of a report.

    Attributes:
        low, high: the ends of the 95% bootstrap interval, where there is one.
        details: other numbers that belong to it.
    """

    name: str
    value: float
    better: str  # "lower" or "higher"
    low: float | None = None
    high: float | None = None
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageFeatures:
    """The features that a network gives, as `features.PerImage`; `with_texts`, those of the prompts as well."""

    network: Extractor
    with_texts: bool = False

    @property
    def name(self) -> str:
        return self.network.name + ("-with-texts" if self.with_texts else "")

    @property
    def description(self) -> dict[str, Any]:
        return {"weights_sha256": self.network.weights_hash, **self.network.recipe}

    @property
    def uses_prompts(self) -> bool:
        return self.with_texts

    def extract(self, pixels: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        inputs = torch.stack([self.network.preprocess(image) for image in pixels])
        parts = [self.network.outputs(part) for part in inputs.split(16)]
        arrays = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        if self.with_texts and self.network.texts is not None:
            arrays["texts"] = self.network.texts([prompt.text for prompt in prompts]).numpy()
        return arrays


# Which networks


def check_metrics(config: EvaluateConfig) -> None:
    """Raises UserError if a metric needs what was not given."""
    if not config.metrics:
        raise UserError(
            "--metrics: names no metric; give some, such as --metrics fid. Only a model without --prompts and "
            "--reference needs none: it is measured on the built-in shapes"
        )
    if config.protocol is not None and config.prompts is None:
        raise UserError(f"--protocol {config.protocol}: needs --prompts, {PROTOCOL_PROMPTS[config.protocol]}")
    if config.reference is not None and not comparing(config):
        raise UserError(
            f"--reference {config.reference}: --metrics {' '.join(config.metrics)} compares with no real images; leave "
            "the reference out, or add a metric such as fid"
        )
    for metric in config.metrics:
        if metric in NEED_REFERENCE and config.reference is None:
            raise UserError(f"--metrics {metric}: compares with real images; give --reference")
        if metric in NEED_PROMPTS and config.prompts is None:
            raise UserError(f"--metrics {metric}: needs the --prompts of the images")
    if "attributes" in config.metrics and config.prompts not in ("shapes", "shapes:two"):
        raise UserError("--metrics attributes: needs --prompts shapes or shapes:two, whose attributes are known")


def comparing(config: EvaluateConfig) -> list[str]:
    """The metrics that compare with --reference."""
    return [metric for metric in config.metrics if metric in NEED_REFERENCE]


def build_extractors(config: EvaluateConfig) -> dict[str, PerImage]:
    """{metric: what computes its features}; metrics share networks. Raises UserError for weights that are missing."""
    device = pick_device(config.device)
    kinds = {metric: network_of(metric, config) for metric in config.metrics}
    built = {kind: _build(kind, config, device) for kind in dict.fromkeys(kinds.values())}
    names = [each.name for each in built.values()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--metrics {' '.join(config.metrics)}: two networks are called {name}; evaluate them in "
                "two runs, or give a --feature_extractor of another name"
            )
    return {metric: built[kind] for metric, kind in kinds.items()}


def by_name(extractors: Mapping[str, PerImage], metrics: Sequence[str]) -> dict[str, PerImage]:
    """{name: extractor} of these metrics, each extractor once."""
    return {extractors[metric].name: extractors[metric] for metric in metrics}


def network_of(metric: str, config: EvaluateConfig) -> str:
    """inception, dinov2, cmmd, clip, attributes, or own: that of --feature_extractor."""
    if metric in ("kid", "prdc", "retrieval", "fd") and config.feature_extractor is not None:
        return "own"
    fixed = {"fd_dinov2": "dinov2", "cmmd": "cmmd", "clip_score": "clip", "attributes": "attributes"}
    return fixed.get(metric, "dinov2" if metric == "retrieval" else "inception")


def _build(kind: str, config: EvaluateConfig, device: torch.device) -> PerImage:
    if kind == "attributes":
        return AttributeReader(scene_kind(config))
    if kind == "inception":
        convention = config.inception_input or "pytorch-fid"
        return ImageFeatures(inception_extractor(config.inception_weights, convention, device))
    if kind == "clip":
        return ImageFeatures(clip_extractor(config.clip_name_or_path, device), with_texts=True)
    if kind == "cmmd":
        return ImageFeatures(cmmd_extractor(config.cmmd_name_or_path, device))
    if kind == "dinov2":
        return ImageFeatures(dinov2_extractor(config.dinov2_name_or_path, device))
    return ImageFeatures(own_extractor(str(config.feature_extractor), device))


# Scores


def compute_scores(
    config: EvaluateConfig,
    extractors: dict[str, PerImage],
    generated: dict[str, FeatureSet],
    reference: dict[str, FeatureSet | FeatureStatistics],
    prompts: Sequence[Prompt],
    half: int | None = None,
    extrapolate: bool = True,
) -> list[Score]:
    """All scores, in the order of --metrics.

    Args:
        generated, reference: {name of the extractor: features}.
        prompts: of all generated images, if they have any.
        half: 0 or 1: only every second generated image.
        extrapolate: also the Frechet distances for infinitely many images, which take most of the time.

    Raises UserError if a score is not finite.
    """
    scores: list[Score] = []
    for metric in config.metrics:
        extractor = extractors[metric]
        features = generated[extractor.name] if half is None else generated[extractor.name].half(half)
        if metric not in NEED_REFERENCE:
            scores += _scores_alone(metric, extractor, features)
        elif metric in FRECHET:
            scores.append(_frechet(extractor, features, reference[extractor.name], extrapolate))
        else:
            scores += _scores_compared(metric, config, extractor.name, features, reference[extractor.name], prompts)
    for score in scores:
        if not math.isfinite(score.value):
            raise UserError(f"{score.name}: is {score.value}; nothing was written")
    return scores


def _scores_alone(metric: str, extractor: PerImage, features: FeatureSet) -> list[Score]:
    """Of attributes, is and clip_score, which need no real images."""
    if isinstance(extractor, AttributeReader):
        return [Score(name, value, "higher") for name, value in extractor.accuracies(features).items()]
    if metric == "is":
        splits = min(10, len(features))
        value, deviation = inception_score(features.tensor("logits"), num_splits=splits)
        return [Score("is", value, "higher", details={"deviation_of_splits": deviation, "splits": splits})]
    assert metric == "clip_score" and isinstance(extractor, ImageFeatures)
    similarities = clip_similarities(features.tensor("features"), features.tensor("texts"))
    low, high = (max(0.0, end) for end in mean_interval(similarities))  # as the score
    return [Score(f"clip_score-{extractor.network.name}", clip_score(similarities), "higher", low, high)]


def _frechet(
    extractor: PerImage, features: FeatureSet, reference: FeatureSet | FeatureStatistics, extrapolate: bool
) -> Score:
    assert isinstance(extractor, ImageFeatures)
    real = reference if isinstance(reference, FeatureStatistics) else statistics_of(reference.tensor("features"))
    value = frechet_distance(statistics_of(features.tensor("features")), real)
    details = {}
    if extrapolate and 4 <= len(features) < SMALL_SET:  # the bias that grows as 1/n is then worth knowing
        details["for_infinitely_many_images"] = frechet_distance_at_infinity(features.tensor("features"), real)
    return Score(extractor.network.distance.lower(), value, "lower", details=details)


def _scores_compared(
    metric: str,
    config: EvaluateConfig,
    network: str,
    features: FeatureSet,
    reference: FeatureSet | FeatureStatistics,
    prompts: Sequence[Prompt],
) -> list[Score]:
    """Of kid, cmmd, retrieval and prdc, which compare with single real images. `network` is the extractor's name."""
    if isinstance(reference, FeatureStatistics):
        raise UserError(
            f"--metrics {metric}: compares single images, and --reference {config.reference} has their statistics only;"
            " give the images"
        )
    mine, real = features.tensor("features"), reference.tensor("features")
    suffix = "" if network.startswith("inception") else f"-{network}"
    if metric == "kid":
        size = min(config.kid_subset_size, len(mine), len(real))
        value, deviation = kid_of_subsets(mine, real, num_subsets=config.kid_subsets, subset_size=size)
        whole, low, high = kid_interval(mine, real)
        details = {"deviation_of_subsets": deviation, "subsets": config.kid_subsets, "subset_size": size}
        return [Score(f"kid{suffix}", value, "lower", low, high, {**details, "whole_sets": whole})]
    if metric == "cmmd":
        return [Score("cmmd", cmmd(mine, real), "lower")]
    if metric == "retrieval":
        return _retrieval(config, suffix, features, reference, prompts)
    shares = precision_recall_density_coverage(mine, real, config.nearest_k)
    return [Score(f"{name}{suffix}", value, "higher") for name, value in vars(shares).items()]


def _retrieval(
    config: EvaluateConfig, suffix: str, features: FeatureSet, reference: FeatureSet, prompts: Sequence[Prompt]
) -> list[Score]:
    """The shares of images whose named image is nearest, or among the nearest; and the median rank, from 0."""
    centered = config.retrieval_cosine == "centered"
    ranks = retrieval_ranks(features, reference, prompts, centered)
    suffix += "-centered" if centered else ""
    scores = [
        Score(
            f"retrieval_top{k}{suffix}",
            float((ranks < k).mean()),
            "higher",
            details={"chance": min(1, k / len(reference)), "num_images": len(ranks)},
        )
        for k in (1, NEAREST)
    ]
    return [*scores, Score(f"retrieval_median_rank{suffix}", float(np.median(ranks)), "lower")]
