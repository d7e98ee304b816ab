"""The flags of a source, whichever command has them."""

from typing import Any

import pytest

from uvit.config.extract import AutoencoderConfig, ExtractConfig, TokenizerConfig
from uvit.config.source import check_split
from uvit.errors import UserError

FLAGS: dict[str, Any] = {"source": ("shapes",), "output_dir": "out"}


@pytest.mark.parametrize(
    ("command", "flags"), [(AutoencoderConfig, {}), (TokenizerConfig, {}), (ExtractConfig, {"latents": "none"})]
)
def test_val_every_makes_train_and_val_alone(command: Any, flags: dict[str, Any]) -> None:
    if command is ExtractConfig:
        flags = flags | {"text": "tokens"}
    assert command(**FLAGS, **flags, val_every=10, split="val").val_every == 10
    with pytest.raises(UserError, match=r"^--split validation: --val_every 10 makes the splits train and val$"):
        command(**FLAGS, **flags, val_every=10, split="validation")


@pytest.mark.parametrize("split", ["", "../x", "a/b", ".", "-x"])
def test_a_split_is_the_name_of_a_folder(split: str) -> None:
    with pytest.raises(UserError, match="must be a plain name, such as train or val"):
        check_split(split)
    check_split(None)
    check_split("val-2014.b")
