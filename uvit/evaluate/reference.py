"""Files of statistics: `uvit evaluate statistics` writes one, `uvit evaluate A.npz --reference B.npz` compares two."""

from pathlib import Path
from typing import Any

from uvit.config.evaluate import EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.check_flags import check_flags
from uvit.evaluate.features import describe_images, extract_features, load_features
from uvit.evaluate.frechet import frechet_distance, statistics_of
from uvit.evaluate.image_sets import open_images
from uvit.evaluate.inception import WEIGHTS_SHA256_PREFIX
from uvit.evaluate.measure import FRECHET, ImageFeatures, Score, build_extractors
from uvit.evaluate.statistics_file import (
    SavedStatistics,
    check_same_origin,
    is_statistics,
    read_statistics,
    write_statistics,
)
from uvit.io import file_sha256
from uvit.progress import Progress
from uvit.sample.files import check_writable


def store_statistics(config: EvaluateStatisticsConfig) -> None:
    """The command. It resumes: the features are kept in OUTPUT.features."""
    output = Path(config.output)
    if output.suffix != ".npz":
        raise UserError(f"--output {output}: must end in .npz")
    check_writable(output.parent, f"--output {output}")
    shared = {name: value for name, value in vars(config).items() if name not in ("images", "output", "metric")}
    settings = EvaluateConfig(model=config.images, output_dir=str(output), metrics=(config.metric,), **shared)
    images = open_images(settings, config.images, "images", config.resolution)
    check_flags(config, settings)
    [extractor] = build_extractors(settings).values()
    assert isinstance(extractor, ImageFeatures)
    folder = output.with_name(f"{output.name}.features")
    with Progress("statistics", len(images), "image", bar=not config.disable_tqdm) as progress:
        extract_features(images, [], [extractor], folder, 0, 1, progress)
    features = load_features(images, extractor, folder)
    if len(features) < 2:
        raise UserError(f"--images {config.images}: has {len(features)} image, and statistics need 2 or more")
    network, described = extractor.network, describe_images(images, features)
    write_statistics(output, statistics_of(features.tensor("features")), network, described)
    print(f"{output}: {len(features):,} images, {network.distance}; left out: {len(features.problems):,}")
    print(f"{folder} can be deleted: it holds the features of single images")


def score_statistics(config: EvaluateConfig) -> tuple[Score, SavedStatistics, SavedStatistics]:
    """(the distance of two files of statistics, the first one, the second one).

    No network is needed. Raises UserError if they cannot be compared.
    """
    if not is_statistics(str(config.reference)):
        raise UserError(
            f"{config.model}: holds statistics; give --reference another .npz file, or give the images as the model "
            "and this file as --reference: the distance is the same"
        )
    if len(config.metrics) != 1 or config.metrics[0] not in FRECHET:
        raise UserError(f"{config.model}: holds statistics; give one of --metrics {', '.join(FRECHET)}")
    first, second = (read_statistics(Path(str(name))) for name in (config.model, config.reference))
    check_same_origin(first, second)
    name = _distance_name(first) or _distance_name(second) or config.metrics[0]
    score = Score(name, frechet_distance(first.statistics, second.statistics), "lower")
    return score, first, second


def describe_statistics(saved: SavedStatistics) -> dict[str, Any]:
    """What a report says of a file of statistics."""
    return {
        "statistics": str(saved.path),
        "sha256": file_sha256(saved.path),
        "num_images": saved.statistics.num_images,
        **(saved.images or {}),
    }


def describe_extractor(saved: SavedStatistics) -> dict[str, Any]:
    """{name of the extractor: its weights and recipe}, as a report of images has it; empty if the file says nothing."""
    if saved.extractor is None:
        return {}
    return {saved.extractor: {"weights_sha256": saved.weights_hash, **(saved.recipe or {})}}


def _distance_name(saved: SavedStatistics) -> str | None:
    """As of the extractor that made the features, if the file says which."""
    if saved.extractor is None:
        return None
    if not saved.extractor.startswith("inception-"):
        return f"fd-{saved.extractor}".lower()
    return "fid" if str(saved.weights_hash).startswith(WEIGHTS_SHA256_PREFIX) else "fd-inception"
