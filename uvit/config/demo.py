"""Flags of `uvit demo`."""

from dataclasses import dataclass

from uvit.config.paths import PathFlag, expand_paths


@dataclass(frozen=True)
class DemoConfig:
    """Train a model on built-in images of shapes, and generate images with it: four commands in 2 to 4 minutes on two
    CPU cores.

    Each command is printed before it runs. Stop the demo at any time. Run it again to resume.

    uvit demo --output_dir output/demo
    """

    output_dir: PathFlag | None = None
    """The folder for all results. Default: output/demo, or output/demo-fast with --fast."""
    fast: bool = False
    """Run the same commands in under a minute. That is too short to learn anything."""

    def __post_init__(self) -> None:
        expand_paths(self)

    def folder(self) -> str:
        return self.output_dir or ("output/demo-fast" if self.fast else "output/demo")
