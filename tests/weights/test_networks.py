"""Pass one of reading weights: where the components of a source lie, and the arrays of each network there."""

from pathlib import Path

import pytest
import torch

from tests.port import PORT_FOLDER, same, tiny_unet
from uvit.errors import UserError
from uvit.export.formats import save_pth
from uvit.weights.networks import Location, locate, read_networks
from uvit.weights.pdparams import write_pdparams
from uvit.weights.report import Report


def test_the_locations_of_a_pipeline() -> None:
    locations = locate(PORT_FOLDER, overridden=["vqvae"])
    assert locations == [
        Location(PORT_FOLDER / "unet", "unet"),
        Location(PORT_FOLDER / "text_encoder", "text_encoder"),
        Location(PORT_FOLDER / "tokenizer", "tokenizer", saved_by_library=True),
    ]


def test_the_locations_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    assert locate(tmp_path) == [Location(tmp_path / "vae", "vqvae", saved_by_library=True)]
    file = tmp_path / "model_state.pdparams"
    file.touch()
    assert locate(file) == [Location(file)] and locate(tmp_path) == [Location(tmp_path)]
    (tmp_path / "vocab.json").touch()
    assert locate(tmp_path)[1:] == [Location(tmp_path, "tokenizer", saved_by_library=True)]
    with pytest.raises(UserError, match="no such file or folder"):
        locate(tmp_path / "nowhere")


def test_ema_weights_come_before_raw_weights(tmp_path: Path) -> None:
    ema, raw = tiny_unet(1).state_dict(), tiny_unet(2).state_dict()
    save_pth(ema, tmp_path / "nnet_ema.pth")
    save_pth(raw, tmp_path / "nnet.pth")
    report = Report()
    found = list(read_networks(Location(tmp_path), True, None, (), report))
    assert [weights.is_raw for weights in found] == [False, True]
    assert same(found[0].tensors, ema) and same(found[1].tensors, raw) and len(report.read) == 2
    (alone,) = read_networks(Location(tmp_path), False, None, (), Report())
    assert not alone.is_raw and same(alone.tensors, raw)
    assert list(read_networks(Location(tmp_path), True, None, ["unet"], Report())) == []


def test_a_trainer_checkpoint_is_split_into_its_networks(tmp_path: Path) -> None:
    path = tmp_path / "model_state.pdparams"
    unet = {f"unet.{name}": value for name, value in tiny_unet().state_dict().items()}
    write_pdparams(path, unet | {"vae.x": torch.ones(1), "text_encoder.y": torch.ones(2), "other": torch.ones(1)})
    report = Report()
    found = list(read_networks(Location(path), True, None, ["vqvae"], report))
    assert [(weights.component, weights.kind) for weights in found] == [("unet", "uvit"), ("text_encoder",) * 2]
    assert set(found[1].tensors) == {"y"} and report.dropped == ["other"]
