import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from tests.sample.parts import tiny_pipeline_folder
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.sample.export import save_pipeline
from uvit.sample.pipeline import UViTPipeline


@pytest.fixture
def pipeline(tmp_path: Path) -> UViTPipeline:
    return UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path / "tiny", "sample", 0.3))


def save(folder: Path, pipeline: UViTPipeline, latent_scale: float = 0.3) -> None:
    parts = pipeline.unet, pipeline.vqvae, pipeline.text_encoder, pipeline.tokenizer
    save_pipeline(folder, *parts, latent_scale, "sample")


def test_folder_is_laid_out_as_published_ones(tmp_path: Path, pipeline: UViTPipeline) -> None:
    save(tmp_path / "runs" / "new", pipeline)
    folder = tmp_path / "runs" / "new"
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json", "unet", "vqvae", "text_encoder", "tokenizer", "scheduler"
    }  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "UViTPipeline"
    assert (index["latent_scale"], index["prediction_type"]) == (0.3, "sample")
    assert not list(folder.rglob("*.bin"))
    assert list(folder.parent.iterdir()) == [folder]  # nothing is left aside


def test_each_part_opens_by_itself(tmp_path: Path, pipeline: UViTPipeline) -> None:
    save(tmp_path / "p", pipeline)
    unet = UViTT2IModel.from_pretrained(tmp_path / "p", subfolder="unet")
    saved = load_file(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in unet.state_dict().items())
    AutoencoderKL.from_pretrained(tmp_path / "p", subfolder="vqvae")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "p", subfolder="scheduler")
    assert scheduler.config.prediction_type == "epsilon"


def test_a_former_pipeline_is_replaced(tmp_path: Path, pipeline: UViTPipeline) -> None:
    save(tmp_path / "p", pipeline)
    save(tmp_path / "p", pipeline, latent_scale=0.9)
    assert UViTPipeline.from_pretrained(tmp_path / "p").config.latent_scale == 0.9
    assert not list(tmp_path.glob(".p*"))


def test_an_empty_folder_is_filled(tmp_path: Path, pipeline: UViTPipeline) -> None:
    (tmp_path / "p").mkdir()
    save(tmp_path / "p", pipeline)
    assert (tmp_path / "p" / "model_index.json").is_file()


def test_what_is_no_pipeline_is_not_replaced(tmp_path: Path, pipeline: UViTPipeline) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    for place in ("photos", "file"):
        with pytest.raises(UserError, match=place):
            save(tmp_path / place, pipeline)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_a_failure_leaves_the_former_pipeline(
    tmp_path: Path, pipeline: UViTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "p", pipeline)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "p", pipeline, latent_scale=0.9)
    assert UViTPipeline.from_pretrained(tmp_path / "p").config.latent_scale == 0.3
