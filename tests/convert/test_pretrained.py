"""`UViTT2IModel.from_pretrained` opens what diffusers would, and what others wrote."""

from pathlib import Path

import pytest
import torch

from tests.convert.conftest import PORT_FOLDER, same, tiny_unet
from uvit import UViTT2IModel
from uvit.convert.folder import open_part
from uvit.convert.foreign import save_pth
from uvit.errors import UserError


def test_the_ports_network() -> None:
    wanted = open_part(PORT_FOLDER, "unet").state_dict()
    for found in (
        UViTT2IModel.from_pretrained(PORT_FOLDER, subfolder="unet"),
        UViTT2IModel.from_pretrained(str(PORT_FOLDER / "unet")),
        UViTT2IModel.from_pretrained(PORT_FOLDER),
    ):
        assert type(found) is UViTT2IModel and not found.training
        assert same(found.state_dict(), wanted)
    half = UViTT2IModel.from_pretrained(PORT_FOLDER, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_file_of_the_official_code(tmp_path: Path) -> None:
    unet = tiny_unet()
    save_pth(unet.state_dict(), tmp_path / "nnet_ema.pth")
    unet.save_config(tmp_path)  # the shapes of so narrow a network do not tell its heads
    assert same(UViTT2IModel.from_pretrained(tmp_path / "nnet_ema.pth").state_dict(), unet.state_dict())


def test_our_own(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    for found in (
        UViTT2IModel.from_pretrained(tmp_path / "pipeline", subfolder="unet"),
        UViTT2IModel.from_pretrained(str(tmp_path / "pipeline" / "unet"), torch_dtype=torch.float32),
    ):
        assert not found.training and same(found.state_dict(), unet.state_dict())


def test_weights_in_a_pickle_are_not_opened_and_no_network_is_said(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "a" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin"):
        UViTT2IModel.from_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="holds no unet"):
        UViTT2IModel.from_pretrained(PORT_FOLDER / "vqvae")
    with pytest.raises(OSError, match="nothing"):
        UViTT2IModel.from_pretrained(str(tmp_path / "nothing"))
