"""A pipeline folder of the Paddle port, and what it drew."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from uvit.model import UViTT2IModel
from uvit.modern_model import ModernUViTT2IModel

FIXTURES = Path(__file__).parent / "fixtures"
PORT_FOLDER = FIXTURES / "port_pipeline"
TINY = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "clip_dim": 32,
    "num_text_tokens": 7,
}


@pytest.fixture
def drawn() -> dict[str, Tensor]:
    """The port's arrays."""
    with np.load(FIXTURES / "port_pipeline.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def tiny_unet(seed: int = 0, cls: type[UViTT2IModel] = UViTT2IModel, **changes: object) -> UViTT2IModel:
    """Every weight drawn, those of LayerNorms too."""
    torch.manual_seed(seed)
    unet = cls(**(TINY | changes))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter)
    return unet.eval().requires_grad_(False)


def tiny_modern_unet(**changes: object) -> UViTT2IModel:
    return tiny_unet(cls=ModernUViTT2IModel, **changes)


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all bits, names and types are the same."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )
