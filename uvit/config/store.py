"""Flags of `uvit features ...`: what is done with features on disk besides training."""

import re
from dataclasses import dataclass
from typing import Literal

from uvit.config.extract import check_split
from uvit.errors import UserError

MAX_ON_SHEET = 1000  # pairs


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{flag} {value}: must be at least {least}")


@dataclass(frozen=True)
class FeaturesInfoConfig:
    """Say what a feature store, or a folder in the old layout, holds: pairs, shapes, encoders, size, problems."""

    path: str
    """The folder with the features: what `uvit extract` was given as --output_dir, or one in the old layout."""
    split: str | None = None
    """Only this split. Default: all that are there."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        if self.split is not None:
            check_split(self.split)


@dataclass(frozen=True)
class FeaturesVerifyConfig:
    """Read every byte of a feature store, compare it with its checksums, and look at what checksums cannot know:
    shapes, counts, captions and values that are not finite.

    The exit status is 0 where all is well, 1 where something is not, 2 where there are no features.
    """

    path: str
    """The folder with the features. The old layout has no checksums: there, shapes and values are looked at."""
    split: str | None = None
    """Only this split. Default: all that are there."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        if self.split is not None:
            check_split(self.split)


@dataclass(frozen=True)
class FeaturesImportConfig:
    """Turn features in the old layout (train/0.npy, train/0_0.npy, ...) into a feature store, all splits of it.

    Stop it at any time: the same command goes on where it stopped. The old layout keeps no captions as text.
    """

    path: str
    """The folder in the old layout, with empty_context.npy."""
    output_dir: str
    """The feature store to write. New, or with the same import half done."""
    dtype: Literal["float16", "float32"] | None = None
    """In which moments and contexts are stored. Default: as in the old files."""
    vae_name_or_path: str | None = None
    """The VAE that the features were made with, to be recorded; previews and pipelines need it."""
    text_encoder_name_or_path: str | None = None
    """The text encoder that the features were made with, to be recorded."""
    tokenizer_name: str | None = None
    """Its tokenizer, to be recorded. Default: the one beside the text encoder."""
    latent_scale: float | None = None
    """Factor from VAE latents to the model's. Default: that of the VAE which is named; without one 0.2301, U-ViT's own
    for a Stable Diffusion VAE."""
    shard_size: int = 1024
    """Pairs in each file of the store."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        _at_least("shard_size", self.shard_size, 1)
        if self.latent_scale is not None and not self.latent_scale > 0:
            raise UserError(f"--latent_scale {self.latent_scale}: must be above 0")


@dataclass(frozen=True)
class FeaturesExportConfig:
    """Turn a feature store into the old layout: a file for each moments and each context.

    Stop it at any time: the same command goes on where it stopped.
    """

    path: str
    """The feature store."""
    output_dir: str
    """The folder to write. New, or with the same export half done."""
    split: str | None = None
    """Only this split. Default: all that are there."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type of the arrays."""
    text_encoder_name_or_path: str | None = None
    """For a store of token ids alone: what encodes them. Default: the text encoder that the store names."""
    device: str = "auto"
    """Where that text encoder runs: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        if self.split is not None:
            check_split(self.split)


@dataclass(frozen=True)
class FeaturesMergeConfig:
    """Make one feature store of several that were made alike: same encoders, shapes, type and latent scale.

    Pairs come in the order of the parts. Stop it at any time: the same command goes on where it stopped.
    """

    paths: tuple[str, ...]
    """The feature stores, two or more."""
    output_dir: str
    """The feature store to write; the split becomes a folder in it. New, or with the same merge half done."""
    split: str = "train"
    """The split that is taken of each, and written."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        check_split(self.split)
        if len(self.paths) < 2:
            raise UserError(f"--paths {' '.join(self.paths)}: give two feature stores or more to merge")


@dataclass(frozen=True)
class FeaturesSampleConfig:
    """Decode a few pairs of a feature store back into pictures, on one sheet with their captions.

    Each is the mean of its moments through the VAE; mirrored ones, where they are stored, stand beside it.
    """

    path: str
    """The feature store, or a folder in the old layout."""
    split: str = "train"
    """The split to show."""
    num_images: int = 16
    """Pairs to show, drawn by --seed."""
    seed: int = 0
    """Which pairs are drawn."""
    rows: str | None = None
    """Show these instead: numbers from 0, such as 1,5,7 or 0-15."""
    output: str = "features.png"
    """The PNG file to write."""
    vae_name_or_path: str | None = None
    """The VAE to decode with. Default: the one that the store names."""
    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_split(self.split)
        _at_least("num_images", self.num_images, 1)
        if self.num_images > MAX_ON_SHEET:
            raise UserError(f"--num_images {self.num_images}: a sheet holds {MAX_ON_SHEET:,} pairs at most")
        _at_least("seed", self.seed, 0)
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
