"""Flags of `uvit checkpoints ...`: what is on disk of a run."""

from dataclasses import dataclass

from uvit.config.paths import PathFlag, expand_paths


@dataclass(frozen=True)
class CheckpointsListConfig:
    """List the checkpoints of a run: step, samples, size, date, loss, and whether all files are there.

    uvit checkpoints list output/run
    """

    path: PathFlag
    """The run's folder: the --output_dir of `uvit train` or `uvit autoencoder`."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True)
class CheckpointsVerifyConfig:
    """Read every byte of a run's checkpoints and compare the checksums.

    The exit status is 0 if all are whole, and 2 if one is damaged or there are none.

    uvit checkpoints verify output/run
    """

    path: PathFlag
    """The run's folder, or one of its checkpoints."""
    json: bool = False
    """Print JSON, for programs."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
