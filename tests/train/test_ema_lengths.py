"""`uvit ema` on a run: lengths that were kept come back, and runs resume bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from uvit.checkpoint.averages import list_snapshots
from uvit.checkpoint.folder import training_facts
from uvit.cli.main import main
from uvit.config.ema import EmaConfig
from uvit.errors import UserError
from uvit.evaluate.generate import open_model
from uvit.export.reconstruct import open_average
from uvit.train.trainer import train
from uvit.weights.components import load_text_encoder
from uvit.weights.encoders import fingerprint


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_train_resume_reconstruct(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"ema_lengths": (0.1, 0.2), "ema_snapshot_steps": 2, "save_steps": 3}
    run = tmp_path / "run"
    assert train(tiny_config(**flags)) == 0
    snapshots, last = files(run / "ema"), files(run / "checkpoint-6")
    assert list(snapshots) == [
        f"step-0000000{step}-{length}.safetensors" for step in (2, 4, 6) for length in (0.1, 0.2)
    ]
    assert "ema_lengths.safetensors" in last
    kept = load_file(run / "ema" / "step-00000006-0.1.safetensors")
    ema = load_file(run / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in ema.items())  # the first length is the run's EMA

    assert train(tiny_config(**flags, resume_from_checkpoint="checkpoint-3")) == 0
    assert files(run / "ema") == snapshots and files(run / "checkpoint-6") == last
    assert sorted(path.name for path in (run / "set-aside-1" / "ema").iterdir()) == list(snapshots)[2:]

    capsys.readouterr()
    assert main(["ema", str(run), "--length", "0.2"]) == 0
    assert "wrote" in capsys.readouterr().out
    made = load_file(run / "pipeline-ema-0.2" / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = load_file(run / "ema" / "step-00000006-0.2.safetensors")
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, wanted[f"unet.{name}"], rtol=1e-6, atol=1e-8)
    assert json.loads((run / "pipeline-ema-0.2" / "training.json").read_text())["ema_length"] == 0.2
    measured = open_model(str(run), "0.2", "cpu", "float32").pipeline.unet.state_dict()
    assert all(torch.equal(measured[name], tensor) for name, tensor in made.items())

    earlier = open_average(run, 0.1, 4).unet.state_dict()
    wanted = load_file(run / "ema" / "step-00000004-0.1.safetensors")
    for name, tensor in earlier.items():
        torch.testing.assert_close(tensor, wanted[f"unet.{name}"], rtol=1e-6, atol=1e-8)

    assert main(["ema", str(run), "--length", "0.2"]) == 2
    assert "already exists" in capsys.readouterr().err
    train(tiny_config(**flags, resume_from_checkpoint="checkpoint-3", max_steps=5))
    assert (run / "set-aside-2" / "pipeline-ema-0.2").is_dir() and not (run / "pipeline-ema-0.2").exists()
    train(tiny_config(**flags, resume_from_checkpoint="checkpoint-3", max_steps=6))
    assert main(["ema", str(run), "--length", "0.1", "--step", "5"]) == 2
    assert "--step 5:" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"ema_lengths: was \[0.1, 0.2\], now \[0.1\]"):
        train(tiny_config(ema_lengths=(0.1,), resume_from_checkpoint="checkpoint-3"))


def test_a_length_beyond_that_of_equal_weights_is_refused() -> None:
    assert EmaConfig("run").length == 0.05
    with pytest.raises(UserError, match=r"^--length 0\.3: must be above 0 and at most 0\.28$"):
        EmaConfig("run", 0.3)


def test_a_run_without_snapshots_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", str(tmp_path), "--length", "0.1"]) == 2
    assert "has no EMA snapshots" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--ema_lengths 0\.1: .* give a run's folder"):
        open_model(str(tmp_path), "0.1", "cpu", "float32")


def test_a_resume_leaves_no_snapshots_of_what_it_does_again(tiny_config: Any, tmp_path: Path) -> None:
    flags = {"ema_lengths": (0.1,), "save_steps": 4}
    run = tmp_path / "run"
    train(tiny_config(ema_snapshot_steps=2, max_steps=7, **flags))
    shutil.rmtree(run / "checkpoint-7")
    train(tiny_config(ema_snapshot_steps=4, max_steps=8, learning_rate=2e-3, **flags))
    assert [snapshot.step for snapshot in list_snapshots(run)] == [2, 4, 8]


def test_the_last_update_has_a_snapshot(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(ema_lengths=(0.1,), ema_update_steps=2, ema_snapshot_steps=8, save_steps=8, max_steps=7))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "run")] == [6]


def test_a_trained_text_encoder_of_another_length_has_its_own_fingerprint(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(train_text_encoder=True, ema_lengths=(0.1, 0.2), ema_snapshot_steps=2))
    assert main(["ema", str(tmp_path / "run"), "--length", "0.15"]) == 0
    for name in ("pipeline", "pipeline-ema-0.15"):
        folder = tmp_path / "run" / name
        encoder = load_text_encoder(str(folder / "text_encoder"))
        assert training_facts(folder)["text_encoder_sha256"] == fingerprint(encoder)
