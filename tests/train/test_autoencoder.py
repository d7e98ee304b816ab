"""A VAE trained for a moment: it learns, measures itself, opens where VAEs open, and resumes to the bit."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tests.sources.pictures import png
from tests.tiny import save_checkpoint, tiny_vae_folder
from uvit.config.convert import ConvertConfig
from uvit.config.extract import AutoencoderConfig
from uvit.conventions import LatentSpace
from uvit.diffusion import draw_latents
from uvit.errors import UserError
from uvit.export.convert import convert
from uvit.images import to_unit
from uvit.sources.open import open_source, require_random_access
from uvit.train import autoencoder
from uvit.train.autoencoder import build_vae_run, train_autoencoder, vae_step
from uvit.train.vae_model import VaeBatches, build_vae, load_images, measure_vae, split_rows
from uvit.weights.encoders import encode_images, latent_space_of, load_diffusers_vae


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Faster at these sizes, wherever another program takes a core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def config(folder: Path | str, **flags: Any) -> AutoencoderConfig:
    values: dict[str, Any] = {
        "source": ("shapes",),
        "output_dir": str(folder),
        "resolution": 16,
        "factor": 4,
        "channels": 8,
        "max_steps": 100,
        "learning_rate": 3e-3,
        "batch_size": 4,
        "ema_decay": 0.9,
        "device": "cpu",
        "disable_tqdm": True,
    }
    return AutoencoderConfig(**(values | flags))


def test_train_measure_write_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "vae"
    train_autoencoder(config(folder, preview_steps=50))
    facts = json.loads((folder / "training.json").read_text())
    source = require_random_access(open_source("shapes", resolution=16), "--source shapes")
    held_out, rows = split_rows(len(source), 1234)
    images = load_images(source, rows, 16)
    untrained = measure_vae(build_vae(config(folder)), load_images(source, held_out, 16), images[:8])
    assert facts["psnr"] > untrained["psnr"] + 1 and facts["steps"] == 100
    assert (folder / "previews" / "step-000050.png").is_file() and (folder / "previews" / "last.png").is_file()
    assert "PSNR" in capsys.readouterr().out

    vae = load_diffusers_vae(str(folder))
    assert AutoencoderKL.from_pretrained(folder).config.scaling_factor == facts["latent_scale"]
    assert latent_space_of(vae) == LatentSpace(facts["latent_scale"])
    moments = encode_images(vae, to_unit(images))
    latents = latent_space_of(vae).normalize(draw_latents(moments, torch.randn(moments.shape[0], 4, 4, 4)))
    assert latents.std().item() == pytest.approx(1, abs=0.02)  # what the scale is for

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert train_autoencoder(config(folder, preview_steps=50)) == 0
    said = capsys.readouterr().out
    assert f"{folder}: all 100 steps are done" in said and "the VAE was written before" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("factor", [4, 8])
def test_the_factor_is_the_factor(factor: Any, tmp_path: Path) -> None:
    vae = build_vae(config(tmp_path, factor=factor, latent_channels=6))
    moments = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.parameters
    assert moments.shape == (1, 12, 16 // factor, 16 // factor)


def test_held_out_images_are_not_trained_on() -> None:
    held_out, rows = split_rows(100, 0)
    assert len(held_out) == 5 and not set(held_out) & set(rows) and len(rows) == 95
    one, same = split_rows(1, 0)
    assert list(one) == list(same) == [0]


def test_measured_psnr_is_psnr(tmp_path: Path) -> None:
    vae = build_vae(config(tmp_path)).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_unit(images)).latent_dist.mean).sample.clamp(-1, 1)
    error = ((decoded - to_unit(images)) / 2).square().mean().item()
    assert measure_vae(vae, images, images, batch_size=4)["psnr"] == pytest.approx(-10 * np.log10(error), rel=1e-5)


def test_images_that_cannot_be_used_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("red")
        (tmp_path / f"{number}.png").write_bytes(png("red"))
    source = require_random_access(open_source(str(tmp_path)), "--source")
    (tmp_path / "3.png").write_bytes(png("red")[:-30])
    assert load_images(source, np.array([2, 3, 4, 3]), 16).shape == (2, 3, 16, 16)
    assert load_images(source, np.array([3]), 16).shape == (0, 3, 16, 16)
    assert capsys.readouterr().err.count("the image of 3.png cannot be decoded") == 1
    train_autoencoder(config(tmp_path / "vae", source=(str(tmp_path),), max_steps=8, batch_size=1))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="no usable image among"):
        train_autoencoder(config(tmp_path / "none", source=(str(tmp_path),)))


# Resuming


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_at_previews(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A signal comes at every preview, until this is undone."""

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        signal.raise_signal(number)

    save = autoencoder.save_reconstructions
    monkeypatch.setattr(autoencoder, "save_reconstructions", save_and_stop)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, bytes]]]:
    """A function: a folder and flags -> exit status and all files of vae/ in that folder."""

    (tmp_path / "images").mkdir()
    for colour in ("red", "green", "blue", "black", "yellow"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(png(colour))
        (tmp_path / "images" / f"{colour}.txt").write_text(colour)
    usual = {"source": (str(tmp_path / "images"),), "max_steps": 12, "save_steps": 4, "preview_steps": 5}

    def run(folder: str, **flags: Any) -> tuple[int, dict[str, bytes]]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)  # so that the same flags are recorded
        status = train_autoencoder(config("vae", **(usual | flags)))
        return status, contents(Path("vae"))

    return run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_resumes_to_the_bit(
    number: int,
    status: int,
    run: Callable[..., tuple[int, dict[str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, whole = run("whole")
    assert [name for name in whole if name.endswith("uvit.json")] == ["checkpoint-12/uvit.json"]
    with monkeypatch.context() as patch:
        stop_at_previews(patch, number)
        stopped_with, there = run("stopped")
    assert stopped_with == status and "checkpoint-5/uvit.json" in there and "config.json" not in there
    assert "stopped at step 5 of 12, saved; run the same command again to resume" in capsys.readouterr().out
    assert run("stopped") == (0, whole)
    assert "resumed vae/checkpoint-5: step 5 of 12" in capsys.readouterr().out


def test_a_checkpoint_that_is_half_written_is_skipped(
    run: Callable[..., tuple[int, dict[str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, whole = run("whole")
    with monkeypatch.context() as patch:
        stop_at_previews(patch, signal.SIGTERM)
        run("stopped")
    for name in ("checkpoint-8", ".checkpoint-8.writing", ".vae.writing"):  # as kills and bad disks leave them
        shutil.copytree("vae/checkpoint-5", f"vae/{name}")
        Path("vae", name, "weights.safetensors").write_bytes(b"half")
    assert run("stopped") == (0, whole)
    said = capsys.readouterr().out
    assert "vae/checkpoint-8: is not complete" in said and "resumed vae/checkpoint-5" in said


def test_a_finished_folder_is_left_as_it_is_and_more_steps_train_on(
    run: Callable[..., tuple[int, dict[str, bytes]]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = run("vae", max_steps=2)
    assert "checkpoint-2 is kept" in capsys.readouterr().out
    assert run("vae", max_steps=2) == (0, first)
    shutil.rmtree("vae/checkpoint-2")
    record = Path("vae/config.yaml")
    record.write_text(record.read_text().replace("output_dir: vae", "output_dir: vae/"))  # as earlier versions recorded
    assert run("vae", max_steps=2)[0] == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    with pytest.raises(
        UserError,
        match=r"^--output_dir vae: already contains a VAE; .* --overwrite_output_dir\n  --max_steps: was 2, now 4",
    ):
        run("vae", max_steps=4)
    _, others = run("vae", max_steps=2, overwrite_output_dir=True, channels=16)
    assert "what was in vae is now in vae.old1" in capsys.readouterr().out
    assert Path("vae.old1/config.json").read_bytes() == first["config.json"] != others["config.json"]
    assert run("vae", max_steps=3, channels=16)[0] == 0
    said = capsys.readouterr().out
    assert "--max_steps: was 2, now 3" in said and "the VAE of step 3 replaces that of step 2" in said
    assert json.loads(Path("vae/training.json").read_text())["steps"] == 3
    assert load_diffusers_vae("vae")


def test_another_model_or_other_images_are_refused(
    run: Callable[..., tuple[int, dict[str, bytes]]], tmp_path: Path
) -> None:
    run("vae", max_steps=1)
    with pytest.raises(
        UserError, match=r"checkpoint-1: was trained .*\n  --factor: was 4, now 8\n  --seed: was 1234, now 7$"
    ):
        run("vae", max_steps=1, factor=8, seed=7)
    with pytest.raises(UserError, match="--source: was "):
        run("vae", max_steps=1, source=("shapes",))
    (tmp_path / "images" / "more.png").write_bytes(png("white"))
    (tmp_path / "images" / "more.txt").write_text("white")
    with pytest.raises(
        UserError, match=r"choose another --output_dir, or pass .*\n  images of the source: was 5, now 6"
    ):
        run("vae", max_steps=1)
    with pytest.raises(UserError, match="vae/checkpoint-1: is a checkpoint of `uvit autoencoder`, not of `uvit train`"):
        convert(ConvertConfig("vae/checkpoint-1", "pipeline"))
    convert(ConvertConfig("vae", "pipeline"))  # a VAE is one in spite of its checkpoint


def test_a_vae_or_a_run_of_others_is_not_written_into(tmp_path: Path) -> None:
    tiny_vae_folder(tmp_path / "vae")
    before = contents(tmp_path / "vae")
    with pytest.raises(UserError, match="already contains a VAE"):
        train_autoencoder(config(tmp_path / "vae"))
    assert contents(tmp_path / "vae") == before
    save_checkpoint(tmp_path / "run", 1, {"weights": {"a": torch.zeros(1)}}, {"config": {}})
    with pytest.raises(UserError, match="is a checkpoint of `uvit train`, not of `uvit autoencoder`"):
        train_autoencoder(config(tmp_path / "run"))


def test_updates_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    run = build_vae_run(config(tmp_path, batch_size=2), tmp_path, torch.device("cpu"))
    pixels, noise = VaeBatches(run.source, run.rows, run.config)[0]
    vae_step(run, pixels, noise)
    before = {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in run.state().items()}
    vae_step(run, pixels, noise * float("nan"))
    assert run.step == 2 and run.guards.skipped_in_a_row == 1
    for group, tensors in run.state().items():
        assert all(torch.equal(tensor, before[group][name]) for name, tensor in tensors.items())
    vae_step(run, pixels, noise)
    assert not run.guards.skipped_in_a_row and torch.isfinite(next(run.vae.parameters())).all()


def test_a_vae_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--learning_rate 10000000000\.0: the VAE of step 4 gives NaN or Inf"):
        train_autoencoder(config(tmp_path / "vae", learning_rate=1e10, max_steps=4, batch_size=1))
    assert not (tmp_path / "vae" / "config.json").exists()


def test_a_loss_that_stays_not_finite_ends_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite for 20 steps .* there is no checkpoint yet\. Try a low"):
        train_autoencoder(config(tmp_path / "vae", learning_rate=1e38, save_steps=5, batch_size=1))
