import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.utils import logging

from tests.sample.parts import tiny_pipeline_folder
from tests.tiny import save_checkpoint, tiny_text_encoder_folder
from uvit.checkpoint.folder import newer_checkpoint
from uvit.device import slow_precision
from uvit.errors import UserError
from uvit.sample.load import find_pipeline, open_pipeline
from uvit.weights.encoders import load_transformers_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("run"))


def test_a_pipeline_s_folder_or_the_run_that_holds_it(folder: Path) -> None:
    assert find_pipeline(str(folder)) == folder
    assert folder.name == "pipeline"
    assert find_pipeline(str(folder.parent)) == folder


def test_a_pipeline_that_is_older_than_its_run_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "pipeline")
    (run / "pipeline" / "training.json").write_text('{"step": 9}')
    save_checkpoint(run, 9, {"weights": {"w": torch.zeros(1)}}, {})
    open_pipeline(str(run), "cpu")
    assert "older" not in capsys.readouterr().err
    save_checkpoint(run, 10, {"weights": {"w": torch.zeros(1)}}, {})
    assert newer_checkpoint(run / "pipeline") == run / "checkpoint-10"
    open_pipeline(str(run), "cpu")
    made = f"uvit convert {run}/checkpoint-10 {run}/pipeline-10"
    assert f"pipeline is older than checkpoint-10 of its run; for that one: {made}" in capsys.readouterr().err


def test_what_to_do_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pipeline absent: there is no such folder; .*OUTPUT_DIR/pipeline"):
        find_pipeline("absent")
    with pytest.raises(UserError, match=r"--compare_with .*: has no model_index.json"):
        find_pipeline(str(tmp_path), "compare_with")

    for step in (9, 10):
        save_checkpoint(tmp_path / "run", step, {"weights": {"w": torch.zeros(1)}}, {})
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=f"a training run without a pipeline; .*: uvit convert {run}/checkpoint-10 {run}/pipeline$"
    ):
        find_pipeline(str(run))
    with pytest.raises(UserError, match=f"is a training checkpoint; .*: uvit convert {run}/checkpoint-9 {run}/pipe"):
        find_pipeline(str(run / "checkpoint-9"))


def test_a_file_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "nnet.pth").touch()
    with pytest.raises(UserError, match=r"nnet.pth: is a file; .*: uvit convert .*nnet.pth pipeline"):
        find_pipeline(str(tmp_path / "nnet.pth"))


@pytest.mark.parametrize("damage", ["cut", "no vae", "no json", "another's text encoder"])
def test_a_pipeline_that_is_not_whole_is_one_sentence(folder: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if damage == "cut":
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no vae":
        shutil.rmtree(copy / "vqvae")
    elif damage == "no json":
        (copy / "unet" / "config.json").write_text("{")
    else:
        shutil.rmtree(copy / "text_encoder")
        text = tiny_text_encoder_folder(tmp_path / "text", width=16)
        load_transformers_encoder(str(text)).save_pretrained(copy / "text_encoder")
    with pytest.raises(
        UserError, match=f"--pipeline {copy}: is incomplete, or its components do not fit together"
    ) as caught:
        open_pipeline(str(copy), "cpu")
    assert ("text embeddings are 16 wide, but the U-ViT takes 32" in str(caught.value)) == damage.startswith("another")


def test_opens_with_what_is_asked_for(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = logging.is_progress_bar_enabled()
    pipeline = open_pipeline(str(folder.parent), "cpu", "bfloat16", "unipc")
    assert pipeline.unet.dtype == torch.bfloat16
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    slow = slow_precision("--dtype bfloat16", torch.device("cpu"), torch.bfloat16)
    assert capsys.readouterr().err == "".join(f"warning: {sentence}\n" for sentence in slow)
    assert logging.is_progress_bar_enabled() == before


def test_networks_wait_on_a_gpu_s_processor_only(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--enable_model_cpu_offload: .* --device cpu"):
        open_pipeline(str(folder), "cpu", model_cpu_offload=True)
    if torch.cuda.is_available():
        pipeline = open_pipeline(str(folder), "cuda", model_cpu_offload=True)
        assert pipeline("a", num_inference_steps=2, output_type="pt").images.isfinite().all()
        assert pipeline.unet.device.type == "cpu"
