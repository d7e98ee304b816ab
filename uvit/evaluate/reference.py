"""`uvit evaluate statistics`: the mean and the covariance of the features of real images, as one file."""

from pathlib import Path

from uvit.config.evaluate import EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.features import extract_features, load_features
from uvit.evaluate.image_sets import open_images
from uvit.evaluate.measure import ImageFeatures, build_extractors, statistics_of_features
from uvit.evaluate.statistics_file import write_statistics
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
    [writer] = build_extractors(settings).values()
    assert isinstance(writer, ImageFeatures)
    images = open_images(settings, config.images, "images", config.resolution)
    folder = output.with_name(f"{output.name}.features")
    with Progress("statistics", len(images), "image", bar=not config.disable_tqdm) as progress:
        extract_features(images, [], [writer], folder, 0, 1, progress)
    features = load_features(images, writer, folder)
    described = {**images.description, "pixels_sha256": features.pixels_sha256}
    if features.problems:
        described["problems"] = features.problems
    if len(features) < 2:
        raise UserError(f"--images {config.images}: has {len(features)} image, and statistics need 2 or more")
    write_statistics(output, statistics_of_features(features), writer.extractor, described)
    print(f"{output}: {len(features):,} images, {writer.extractor.distance}; left out: {len(features.problems):,}")
    print(f"{folder} can be deleted: it holds the features of single images")
