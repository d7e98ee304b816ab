"""Flags of `uvit features ...`: what is done with features on disk besides training."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from uvit.config.bounds import Bounds, PositiveFloat, PositiveInt, Seed, check_bounds
from uvit.config.paths import PathFlag, expand_paths
from uvit.config.source import check_split
from uvit.errors import UserError

MAX_ON_SHEET = 1000  # pairs


@dataclass(frozen=True)
class FeaturesInfoConfig:
    """Show what a feature store, or a folder of .npy features, holds: pairs, shapes, encoders, size, problems.

    uvit features info output/features
    """

    path: PathFlag
    """The folder with the features: the --output_dir of `uvit extract`, or .npy features in the U-ViT layout."""
    split: str | None = None
    """Only this split. Default: all splits."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_split(self.split)


@dataclass(frozen=True)
class FeaturesVerifyConfig:
    """Check a feature store: read every byte, compare checksums, and check shapes, counts, captions, NaN and Inf.

    The exit status is 0 if no problems are found, 1 if something is wrong, and 2 if there are no features.

    uvit features verify output/features
    """

    path: PathFlag
    """The folder with the features. .npy features have no checksums: only shapes and values are checked."""
    split: str | None = None
    """Only this split. Default: all splits."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_split(self.split)


@dataclass(frozen=True)
class FeaturesImportConfig:
    """Convert .npy features in the U-ViT layout (train/0.npy, train/0_0.npy, ...) to a feature store, with all splits.

    Stop it at any time. Run the same command again to resume. The .npy layout has no captions as text.

    uvit features import npy_features --output_dir output/features
    """

    path: PathFlag
    """The folder of .npy features, with empty_context.npy."""
    output_dir: PathFlag
    """The feature store to write: new, or left by the same command."""
    dtype: Literal["float16", "float32"] | None = None
    """Type in which moments and text embeddings are stored. Default: that of the .npy files."""
    vae_name_or_path: PathFlag | None = None
    """The VAE that made the features. The store records it, for previews and pipelines."""
    text_encoder_name_or_path: PathFlag | None = None
    """The text encoder that made the features, for the record."""
    tokenizer_name: PathFlag | None = None
    """Its tokenizer, for the record. Default: the text encoder's tokenizer."""
    latent_scale: PositiveFloat | None = None
    """Factor from VAE latents to model latents. Default: that of --vae_name_or_path; without it 0.2301, U-ViT's own for
    a Stable Diffusion VAE."""
    shard_size: PositiveInt = 1024
    """Pairs per file of the store."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)


@dataclass(frozen=True)
class FeaturesExportConfig:
    """Convert a feature store to .npy features in the U-ViT layout: one file per image and per text embedding.

    Stop it at any time. Run the same command again to resume.

    uvit features export output/features --output_dir output/npy_features
    """

    path: PathFlag
    """The feature store."""
    output_dir: PathFlag
    """The folder to write: new, or left by the same command."""
    split: str | None = None
    """Only this split. Default: all splits."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type of the arrays."""
    text_encoder_name_or_path: PathFlag | None = None
    """The text encoder for a store that has token ids only. Default: the one the store names."""
    device: str = "auto"
    """Where the text encoder runs: cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_split(self.split)


@dataclass(frozen=True)
class FeaturesMergeConfig:
    """Merge feature stores that were made alike: with the same encoders, shapes, type and latent scale.

    The pairs keep the order of the stores. Stop it at any time. Run the same command again to resume.

    uvit features merge output/first output/second --output_dir output/features
    """

    paths: tuple[PathFlag, ...]
    """The feature stores, two or more."""
    output_dir: PathFlag
    """The feature store to write: new, or left by the same command. The split is a folder in it."""
    split: str = "train"
    """The split to merge."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_split(self.split)
        if len(self.paths) < 2:
            raise UserError(f"--paths {' '.join(self.paths)}: give two or more feature stores to merge")


@dataclass(frozen=True)
class FeaturesSampleConfig:
    """Decode some pairs of a feature store to images, on one contact sheet with their captions.

    Each image is the decoded mean of its moments. If mirrored images are stored, they are shown beside it.

    uvit features sample output/features --output features.png
    """

    path: PathFlag
    """The feature store, or a folder of .npy features in the U-ViT layout."""
    split: str = "train"
    """The split to show."""
    num_images: Annotated[int, Bounds(least=1, most=MAX_ON_SHEET)] = 16
    """Number of pairs, chosen at random."""
    seed: Seed = 0
    """Seed of the choice."""
    rows: str | None = None
    """Show these pairs instead: numbers from 0, such as 1,5,7 or 0-15."""
    output: PathFlag = "features.png"
    """The PNG file to write."""
    vae_name_or_path: PathFlag | None = None
    """The VAE to decode with. Default: the one the store names."""
    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        check_split(self.split)
        self.row_numbers()

    def row_numbers(self) -> list[int] | None:
        """--rows 1,5-7 -> [1, 5, 6, 7]."""
        if self.rows is None:
            return None
        numbers: list[int] = []
        for item in self.rows.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
            if match is None:
                raise UserError(f"--rows {self.rows}: must be numbers from 0, such as 1,5,7 or 0-15")
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < first + MAX_ON_SHEET:
                raise UserError(f"--rows {self.rows}: {item} must name 1 to {MAX_ON_SHEET:,} rows")
            numbers += range(first, last + 1)
        return numbers
