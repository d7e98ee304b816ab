"""What the flags of several commands have in common: where pairs come from, and how their images are prepared."""

import re
from typing import Literal, Protocol

from uvit.errors import UserError

Crop = Literal["center", "random", "pad", "stretch"]
Resize = Literal["lanczos", "bicubic", "bilinear", "box"]
Icc = Literal["srgb", "ignore"]


class SourceFlags(Protocol):
    """The flags that say which pairs are read."""

    @property
    def source(self) -> tuple[str, ...]: ...
    @property
    def split(self) -> str: ...
    @property
    def val_every(self) -> int | None: ...
    @property
    def image_folder(self) -> tuple[str, ...]: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def caption_column(self) -> str | None: ...


def check_split(split: str | None) -> None:
    """A split is the name of a folder in a feature store; None stands for all of them."""
    if split is not None and not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"--split {split}: must be a plain name, such as train or val")


def check_val_every(split: str, val_every: int | None) -> None:
    if val_every is not None and split not in ("train", "val"):
        raise UserError(f"--split {split}: --val_every {val_every} makes the splits train and val")
