"""A page that generates images from text, with the model in the folder `model` beside this file.

    pip install -r requirements.txt gradio
    python app.py

`uvit convert --to space` wrote it. It needs gradio and diffusers, and not the package that trained the model.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

MODEL = Path(__file__).parent / "model"
IMAGES_AT_ONCE, MAX_STEPS, MAX_GUIDANCE, MAX_CHARACTERS, MAX_SEED = 4, 100, 15.0, 1000, 2**31 - 1
MAX_WAITING = 20  # people in the queue


@functools.cache
def load_model() -> Any:
    """The pipeline, loaded once. The code that it runs is in the folder of the model."""
    pipeline = DiffusionPipeline.from_pretrained(str(MODEL), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate_images(
    prompt: str,
    negative_prompt: str = "",
    guidance_scale: float = 2.0,
    num_inference_steps: float = 25,
    num_images: float = 1,
    seed: float = 0,
    report: Callable[[float], object] = lambda share: None,
) -> list[Image.Image]:
    """Image i has the seed `seed` + i. `report` is told which share of the steps is done."""
    seeds = [int(seed) + i for i in range(int(num_images))]

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        report((step + 1) / num_inference_steps)
        return {}

    return load_model()(
        prompt,
        negative_prompt=negative_prompt or None,
        guidance_scale=guidance_scale,
        num_inference_steps=int(num_inference_steps),
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(number) for number in seeds],
        callback_on_step_end=after_step,
    ).images


def build_page() -> Any:
    import gradio

    def respond(
        prompt: str,
        negative_prompt: str,
        guidance_scale: float,
        num_inference_steps: float,
        num_images: float,
        seed: float,
        new_seed: bool,
        progress: Any = gradio.Progress(),  # noqa: B008 # gradio finds it by its default
    ) -> tuple[list[Image.Image], int]:
        used = random.randrange(MAX_SEED) if new_seed else int(seed)
        arguments = (prompt, negative_prompt, guidance_scale, num_inference_steps, num_images, used)
        return generate_images(*arguments, report=progress), used

    with gradio.Blocks(title="Images from text", analytics_enabled=False) as page:
        hint = "a caption like those that the model was trained on"
        prompt = gradio.Textbox(label="Prompt", placeholder=hint, max_length=MAX_CHARACTERS, autofocus=True)
        button = gradio.Button("Generate", variant="primary")
        # PNG: the pixels as the model made them.
        gallery = gradio.Gallery(label="Images", format="png", columns=2, object_fit="contain")
        with gradio.Accordion("Settings", open=False):
            negative_prompt = gradio.Textbox(label="Negative prompt", max_length=MAX_CHARACTERS)
            guidance = gradio.Slider(1, MAX_GUIDANCE, 2, step=0.1, label="Guidance scale")
            steps = gradio.Slider(1, MAX_STEPS, 25, step=1, label="Steps")
            images = gradio.Slider(1, IMAGES_AT_ONCE, 1, step=1, label="Images")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            new_seed = gradio.Checkbox(True, label="A new seed each time")
        settings = [prompt, negative_prompt, guidance, steps, images, seed, new_seed]
        # One at a time: a pipeline is not to be used by two threads.
        gradio.on(
            [prompt.submit, button.click], respond, settings, [gallery, seed], api_name="generate", concurrency_limit=1
        )
    return page.queue(max_size=MAX_WAITING)


if __name__ == "__main__":
    load_model()  # before the first visitor
    build_page().launch()
