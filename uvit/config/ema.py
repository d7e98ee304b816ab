"""Flags of `uvit ema`."""

from dataclasses import dataclass
from typing import Annotated

from uvit.config.bounds import Bounds, PositiveInt, check_bounds
from uvit.config.paths import PathFlag, expand_paths

EmaLength = Annotated[float, Bounds(above=0, most=0.28)]


@dataclass(frozen=True)
class EmaConfig:
    """Make a pipeline with EMA weights of any length, from the snapshots of a run with --ema_lengths (post-hoc EMA).

    uvit ema output/run --length 0.05
    """

    run: PathFlag
    """The run's folder: the --output_dir of `uvit train`."""
    length: EmaLength = 0.05
    """The length of the average, as a fraction of the steps so far: 0.05 averages the last steps, 0.2 most of them."""
    step: PositiveInt | None = None
    """Average the steps up to this one, of which there must be a snapshot. Default: that of the last snapshot."""
    output_dir: PathFlag | None = None
    """The pipeline folder to write. Default: RUN/pipeline-ema-LENGTH."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
