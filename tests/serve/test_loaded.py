"""A model in the memory of a worker."""

import gc
import io
import os
import shutil
import weakref
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.serve.conftest import OLD
from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.sample.batching import BatchPlan, SharedNetwork
from uvit.serve.loaded import LoadedModel, free_memory, repainted
from uvit.serve.models import make_ref
from uvit.serve.requests import GenerationRequest, ImageTask, ModelRef, tasks_of
from uvit.serve.worker import Worker, WorkerSettings
from uvit.weights.encoders import fingerprint

SETTINGS = WorkerSettings("cpu", "auto", 1, 4, 1, 1_000_000)


@pytest.fixture(scope="module")
def loaded(pipeline_folder: Path) -> LoadedModel:
    return LoadedModel(make_ref("tiny", pipeline_folder, False), SETTINGS)


def task(loaded: LoadedModel, **fields: object) -> ImageTask:
    request = GenerationRequest(prompt="two cats", seed=3, num_inference_steps=3, **fields)  # type: ignore[arg-type]
    return tasks_of(request, loaded.ref, ServeConfig(("x",)))[0]


def test_what_it_says_of_itself(loaded: LoadedModel) -> None:
    assert loaded.description["resolution"] == [32, 32]
    assert {"dpmsolver++", "ddpm", "official"} <= set(loaded.description["schedulers"])
    assert (loaded.description["speeds"], loaded.description["latents"]) == ([], True)


def test_a_checkpoint_has_the_encoders_of_its_run_s_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than in the folder from which it was trained, the paths that it records lead nowhere."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    ref = ModelRef("run@checkpoint-2", str(tmp_path / "run" / "checkpoint-2"), True, ())
    found = LoadedModel(ref, SETTINGS).pipeline
    expected = load_file(tmp_path / "run" / "pipeline" / "vqvae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, found.vqvae.state_dict()[name]) for name, tensor in expected.items())
    # The text encoder was trained: it is the checkpoint's own, and not that of the later pipeline.
    (tmp_path / "run" / "pipeline" / "training.json").unlink()
    found = LoadedModel(ref, SETTINGS).pipeline
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "ema.safetensors")
    own = {name.removeprefix("text_encoder."): saved[name] for name in saved if name.startswith("text_encoder.")}
    later = load_file(tmp_path / "run" / "pipeline" / "text_encoder" / "model.safetensors")
    encoder = found.text_encoder.state_dict()
    assert own and all(torch.equal(tensor, encoder[name]) for name, tensor in own.items())
    assert not all(torch.equal(later[name], tensor) for name, tensor in own.items())
    shutil.rmtree(tmp_path / "run" / "pipeline")
    with pytest.raises(UserError, match="cannot be loaded"):
        LoadedModel(ref, SETTINGS)


def test_settings_of_an_image_say_the_dtype_that_was_used(loaded: LoadedModel) -> None:
    text = loaded.metadata(task(loaded, guidance_scale=2))
    assert (text["dtype"], text["pipeline"], text["seed"]) == ("float32", "tiny", "3")


def test_sizes_that_the_model_has(loaded: LoadedModel) -> None:
    assert loaded.size(task(loaded, size="24x16")) == (16, 24)
    for size in ("30x32", "64x32"):
        with pytest.raises(UserError, match=f"^--size {size}: "):
            loaded.size(task(loaded, size=size))


def test_the_steps_that_are_announced_are_those_that_are_run(loaded: LoadedModel) -> None:
    file = Path(loaded.ref.path).parent / "image.png"
    Image.new("RGB", (32, 32)).save(file)
    for scheduler in ("dpmsolver++", "heun"):
        for image in (None, file.read_bytes()):
            one = replace(task(loaded, scheduler=scheduler), image=image)
            steps, count = loaded.steps(one, 10_000)
            asked, inputs = 0, next(steps)
            with pytest.raises(StopIteration):
                while True:
                    asked += 1
                    inputs = steps.send(loaded.network([inputs])[0])
            assert asked == count


def test_uploads_of_a_request_are_read_once(loaded: LoadedModel) -> None:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(file, "PNG")
    for image in (file.getvalue(), b"no image"):
        first = replace(task(loaded), image=image)
        second = replace(first, index=1, image=bytes(bytearray(image)))  # as a worker gets it: bytes of its own
        found = []
        for each in (first, second):
            try:
                found.append(loaded.uploads(each, 10_000))
            except UserError as error:
                found.append(error.args[0])
        assert found[0] is found[1]
    other = replace(task(loaded), image=file.getvalue())
    assert loaded.uploads(other, 10_000)[0].size == (32, 32)  # type: ignore[union-attr]
    assert loaded.uploads(task(loaded), 10_000) == (None, None)


def test_a_file_that_is_written_again_changes_no_model_in_memory(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    before = make_ref("tiny", folder, False)
    pipeline = LoadedModel(before, SETTINGS).pipeline
    networks = [pipeline.unet, pipeline.vqvae, pipeline.text_encoder]
    expected = [fingerprint(network) for network in networks]
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == len(networks)
    versions = {before}
    for file in files:
        status = file.stat()
        with file.open("r+b") as opened:
            opened.seek(status.st_size // 2)
            opened.write(bytes(status.st_size - status.st_size // 2))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        versions.add(make_ref("tiny", folder, False))
    assert [fingerprint(network) for network in networks] == expected
    assert len(versions) == 1 + len(files)  # so it is opened again
    for file in files:
        os.truncate(file, 10)
    assert [fingerprint(network) for network in networks] == expected  # a mapped file would end the process


def test_an_evicted_model_is_freed_before_the_next_one_is_loaded(pipeline_folder: Path) -> None:
    alive: list[weakref.ref[LoadedModel]] = []

    def load(ref: ModelRef, settings: WorkerSettings) -> LoadedModel:
        assert not any(each() for each in alive)
        made = LoadedModel(ref, settings)
        alive.append(weakref.ref(made))
        return made

    connection, other = Pipe()
    worker = Worker(connection, SETTINGS, SimpleNamespace(LoadedModel=load, free_memory=free_memory))
    gc.collect()
    gc.disable()  # it would come to it in the end
    try:
        for name in ("first", "second"):
            worker.receive("describe", make_ref(name, pipeline_folder, False))
            assert other.recv()[-1] is None
    finally:
        gc.enable()
        connection.close()
        other.close()


def test_masks() -> None:
    mask = Image.new("RGBA", (2, 1), "black")
    mask.putpixel((0, 0), (0, 0, 0, 0))
    assert np.asarray(repainted(mask))[0, :, 0].tolist() == [255, 0]
    assert np.asarray(repainted(Image.new("L", (1, 1), "white"))).max() == 255


def test_padded_calls_have_one_size(loaded: LoadedModel) -> None:
    """As on a GPU."""
    network, sizes = SharedNetwork(loaded.pipeline.unet, 4), []
    inputs = [next(loaded.steps(task(loaded), 1)[0]) for _ in range(3)]
    expected = network.together([*inputs, inputs[-1]])[:3]
    network.plan_for(inputs[0])
    network.plans = dict.fromkeys(network.plans, BatchPlan((4,), is_padded=True))
    hook = loaded.pipeline.unet.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    assert all(torch.equal(*pair) for pair in zip(expected, network(inputs), strict=True))
    hook.remove()
    assert sizes == [8]
