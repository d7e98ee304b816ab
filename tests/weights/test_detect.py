"""What weights are is told by what they hold, or one sentence says that they are nothing known."""

from pathlib import Path

import pytest
import torch

from tests.port import tiny_unet
from uvit.errors import UserError
from uvit.weights.detect import recognise, unwrap

UNET = dict(tiny_unet().state_dict())
VAE = {"encoder.mid_block.resnets.0.conv1.weight": torch.zeros(1)}
PATH = Path("weights.pth")


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (UNET, "uvit"),
        ({f"unet.{name}": value for name, value in UNET.items()}, "trainer"),
        (VAE, "vae"),
        ({"decoder.mid.block_1.conv1.weight": torch.zeros(1)}, "ldm_vae"),
        ({"text_model.embeddings.token_embedding.weight": torch.zeros(1)}, "text_encoder"),
        ({"text_model.token_embedding.weight": torch.zeros(1)}, "text_encoder"),
    ],
)
def test_kinds(tensors: dict[str, torch.Tensor], kind: str) -> None:
    assert recognise(tensors, PATH) == kind
    for wrapper in ("state_dict.", "module.", "state_dict.model."):
        assert recognise(unwrap({wrapper + name: value for name, value in tensors.items()}), PATH) == kind


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (UNET | VAE, "mixes a U-ViT and a VAE in one file"),
        ({"layer.0": torch.zeros(1)}, r"holds 1 arrays \(layer.0\) that are no U-ViT, VAE or CLIP"),
        (UNET | {"label_emb.weight": torch.zeros(1)}, "for classes, not for text"),
        (UNET | {"time_embed.0.weight": torch.zeros(1)}, "MLP on its time token"),
    ],
)
def test_what_is_not_known(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UserError, match=f"^weights.pth: .*{said}"):
        recognise(tensors, PATH)
