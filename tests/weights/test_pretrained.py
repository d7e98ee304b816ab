"""`UViTT2IModel.from_pretrained` opens what diffusers would; `uvit.load_unet` what other systems wrote as well."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.port import PORT_FOLDER, same, tiny_unet
from uvit import UViTT2IModel, load_unet
from uvit.errors import UserError
from uvit.export.formats import save_pth
from uvit.weights.components import read_network


def test_the_ports_network() -> None:
    wanted = read_network(PORT_FOLDER, "unet").state_dict()
    for found in (load_unet(PORT_FOLDER), load_unet(str(PORT_FOLDER / "unet"))):
        assert type(found) is UViTT2IModel and not found.training
        assert same(found.state_dict(), wanted)


def test_a_file_of_the_official_code(tmp_path: Path) -> None:
    unet = tiny_unet()
    save_pth(unet.state_dict(), tmp_path / "nnet_ema.pth")
    unet.save_config(tmp_path)  # the shapes of so narrow a network do not tell its heads
    assert same(load_unet(tmp_path / "nnet_ema.pth").state_dict(), unet.state_dict())


def test_our_own(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    for found in (
        UViTT2IModel.from_pretrained(tmp_path / "pipeline", subfolder="unet"),
        UViTT2IModel.from_pretrained(str(tmp_path / "pipeline" / "unet"), torch_dtype=torch.float32),
        load_unet(tmp_path / "pipeline" / "unet"),
    ):
        assert not found.training and same(found.state_dict(), unet.state_dict())


def test_weights_in_a_pickle_are_not_opened_and_no_network_is_said(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "a" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        UViTT2IModel.from_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin"):
        load_unet(tmp_path / "a")
    with pytest.raises(UserError, match="has no unet"):
        load_unet(PORT_FOLDER / "vqvae")
    with pytest.raises(OSError, match="nothing"):
        UViTT2IModel.from_pretrained(str(tmp_path / "nothing"))


IMPORT_ORDER = """
import sys
from pathlib import Path
{first}
from uvit.model import UViTT2IModel
from uvit import UViTT2IModel as public
assert public is UViTT2IModel
try:
    UViTT2IModel.from_pretrained(Path(sys.argv[1]), subfolder="unet")
except OSError as error:
    assert "safetensors" in str(error), error
else:
    raise AssertionError("PaddleMIX's weights were opened as if they were ours")
"""


@pytest.mark.parametrize("first", ["", "import uvit.weights.components", "import uvit.sample.pipeline"])
def test_what_it_opens_does_not_depend_on_what_was_imported_before(first: str) -> None:
    code = IMPORT_ORDER.format(first=first)
    done = subprocess.run([sys.executable, "-c", code, PORT_FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
