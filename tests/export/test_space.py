"""A folder for a Space: what is in it, that its page generates the pipeline's images, and that Gradio starts it."""

import importlib.util
import os
import py_compile
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement

from tests.port import PORT_FOLDER
from uvit import UViTPipeline
from uvit.cli.main import main
from uvit.config.convert import ConvertConfig
from uvit.export import space_app
from uvit.export.convert import write_pipeline
from uvit.export.space import GRADIO, space_card
from uvit.weights.components import read_components

BY_THE_FUNCTION = """
import sys
sys.modules["uvit"] = None  # not installed
import numpy, app
shares = []
images = app.generate_images("the bus", "a cat", 3.0, 4, 2, 7, shares.append)
assert shares == [0.25, 0.5, 0.75, 1.0], shares
numpy.save("images.npy", [numpy.asarray(image) for image in images])
"""
BY_THE_PAGE = """
import sys
sys.modules["uvit"] = None
import numpy, app
from gradio_client import Client
from PIL import Image
page = app.build_page()
_, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
client = Client(url, verbose=False)
found, seed = client.predict("the bus", "a cat", 3.0, 4, 2, 7, False, api_name="/generate")
assert seed == 7
numpy.save("images.npy", [numpy.asarray(Image.open(each["image"]).convert("RGB")) for each in found])
try:
    client.predict("the bus", "", 3.0, 10**6, 1, 7, False, api_name="/generate")
except Exception as error:
    assert "greater than maximum" in str(error), error
else:
    raise SystemExit("a million steps were not refused")
page.close()
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; `pipeline` beside it is its source."""
    folder = tmp_path_factory.mktemp("of_space")
    components = read_components(PORT_FOLDER)
    components.scheduler_config = None  # instead of the port's, ours
    components.facts = {"config": {"feature_path": str(folder)}}
    (folder / "pipeline").mkdir()
    write_pipeline(components, folder / "pipeline")
    command = ["convert", str(folder / "pipeline"), str(folder / "space"), "--to", "space", "--license", "apache-2.0"]
    assert main(command) == 0
    return folder / "space"


def run_beside(space: Path, script: str, tmp_path: Path) -> np.ndarray:
    """The images that a script saves, which runs in the folder of the page, without this package."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=space, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    images: np.ndarray = np.load(space / "images.npy")
    return images


def test_what_is_in_the_folder(space: Path) -> None:
    assert {path.name for path in space.iterdir()} >= {"app.py", "requirements.txt", "README.md", "model"}
    py_compile.compile(str(space / "app.py"), cfile=str(space.parent / "app.pyc"), doraise=True)
    requirements = [Requirement(line) for line in (space / "requirements.txt").read_text().splitlines()]
    assert {"torch", "diffusers", "transformers"} <= {each.name for each in requirements}
    assert all(each.specifier.contains(version(each.name).split("+")[0]) for each in requirements)
    assert "uvit" not in {each.name for each in requirements}
    head = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "gradio" and head["sdk_version"] == GRADIO and head["license"] == "apache-2.0"
    assert (space / head["app_file"]).is_file() and (space / "model" / "README.md").is_file()
    assert len(head["short_description"]) <= 60  # the Hub refuses longer ones
    texts = [path for path in space.rglob("*") if path.suffix in (".py", ".md", ".json", ".txt")]
    assert texts and not [path for path in texts if str(space.parent) in path.read_text(encoding="utf-8")]


def test_a_card_without_a_licence_names_none() -> None:
    assert "license" not in yaml.safe_load(space_card("painter", None).split("---")[1])


@pytest.mark.slow
def test_the_function_of_the_page_generates_the_pipelines_images(space: Path, tmp_path: Path) -> None:
    images = run_beside(space, BY_THE_FUNCTION, tmp_path)
    assert np.array_equal(images, images_of_the_pipeline(space))
    assert not np.array_equal(images[0], images[1])


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
@pytest.mark.slow
def test_gradio_starts_the_page_and_it_generates_the_same(space: Path, tmp_path: Path) -> None:
    assert np.array_equal(run_beside(space, BY_THE_PAGE, tmp_path), images_of_the_pipeline(space))


def images_of_the_pipeline(space: Path) -> np.ndarray:
    pipeline = UViTPipeline.from_pretrained(space.parent / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    options = {"negative_prompt": "a cat", "guidance_scale": 3.0, "num_inference_steps": 4, "generator": generators}
    return np.stack([np.asarray(image) for image in pipeline("the bus", num_images_per_prompt=2, **options).images])


def test_the_model_is_beside_the_page() -> None:
    assert Path(space_app.__file__).with_name("model") == space_app.MODEL


def test_flags_of_a_space() -> None:
    ConvertConfig("source", "dest", to="space", push_to_hub="me/page", license="mit", vae_name_or_path="vae")
