"""What is opened for each weights; images that do not depend on what is generated beside them."""

from pathlib import Path

import numpy as np
import pytest

from tests.sample.parts import tiny_pipeline_folder
from uvit.errors import UserError
from uvit.evaluate.generate import GeneratedImages, Setting, is_model, open_model
from uvit.evaluate.prompts import Prompt
from uvit.progress import Progress

SETTING = Setting(2.0, (1.0, 1000.0), 2, "dpmsolver++", "ema")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"), num_tokens=77))


def test_pipelines_runs_and_checkpoints_are_models_and_nothing_else_is(pipeline: str, tmp_path: Path) -> None:
    assert is_model(pipeline) and is_model(str(Path(pipeline).parent))
    (tmp_path / "a.png").write_bytes(b"")
    assert not is_model(str(tmp_path)) and not is_model(str(tmp_path / "a.png")) and not is_model("shapes")


def test_an_image_depends_on_its_batch_alone(pipeline: str, tmp_path: Path) -> None:
    model = open_model(pipeline, "ema", "cpu", "float32")
    prompts = [Prompt(f"image {i}", str(i)) for i in range(6)]

    def load(name: str, start: int, stop: int) -> np.ndarray:
        images = GeneratedImages(model, prompts, SETTING, 5, 2, "float32", tmp_path / name)
        with Progress("test", None, "image", bar=False, lines=False) as progress:
            return images.load(start, stop, progress).pixels

    whole = load("whole", 0, 6)
    assert whole.shape == (6, 32, 32, 3)
    assert (load("parts", 4, 6) == whole[4:]).all() and (load("parts", 0, 4) == whole[:4]).all()
    assert (load("whole", 0, 6) == whole).all()  # read back
    assert len(list((tmp_path / "whole").glob("*.png"))) == 6


def test_one_set_of_weights_has_no_raw_ones(pipeline: str) -> None:
    with pytest.raises(UserError, match=r"^--ema raw: .* has one set of weights"):
        open_model(pipeline, "raw", "cpu", "float32")
