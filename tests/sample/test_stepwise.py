"""An image made step by step is the pipeline's, to the bit."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.sample.parts import tiny_pipeline_folder
from uvit.sample.denoise import run_steps
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler
from uvit.sample.stepwise import ImageSettings, image_steps, preview


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def half_mask() -> Image.Image:
    mask = Image.new("RGB", (32, 32), "black")
    mask.paste("white", (16, 0, 32, 32))
    return mask


ORIGINAL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 5.0, "guidance_interval": (200, 800)},
        {"guidance_scale": 2.0, "height": 16, "width": 24},
        {"guidance_scale": 2.0, "image": ORIGINAL, "strength": 0.5},
        {"guidance_scale": 2.0, "image": ORIGINAL},
        {"guidance_scale": 2.0, "image": ORIGINAL, "mask_image": half_mask()},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["dpmsolver++", "heun", "ddpm"])
def test_the_image_is_that_of_the_pipeline(pipeline: UViTPipeline, name: str, options: dict[str, Any]) -> None:
    pipeline.scheduler = build_scheduler(name)
    steps = {"num_inference_steps": 6, **options}
    expected = pipeline("two cats", generator=torch.Generator().manual_seed(7), negative_prompt="green", **steps).images
    context, negative = pipeline.encode_prompt("two cats"), pipeline.encode_prompt("green")
    own = build_scheduler(name)
    settings = ImageSettings(seed=7, **steps)
    made = run_steps(image_steps(pipeline, own, context, negative, settings), pipeline.unet)
    assert np.array_equal(np.asarray(made), np.asarray(expected[0]))
    assert pipeline.scheduler is not own


def test_the_preview_of_the_last_step_is_nearly_the_image(pipeline: UViTPipeline) -> None:
    previews: list[np.ndarray] = []
    context, negative = pipeline.encode_prompt("two cats"), pipeline.encode_prompt("")
    settings = ImageSettings(seed=7, num_inference_steps=12, guidance_scale=3.0)
    steps = image_steps(pipeline, build_scheduler(), context, negative, settings)
    inputs = next(steps)
    with torch.no_grad():
        try:
            while True:
                prediction = pipeline.unet(*inputs)
                previews.append(np.asarray(preview(pipeline, inputs, prediction, 3.0), dtype=float))
                inputs = steps.send(prediction)
        except StopIteration as end:
            image = np.asarray(end.value, dtype=float)
    errors = [np.abs(each - image).mean() for each in previews]
    assert errors[-1] < 2 < errors[0]
