"""What the pipeline is called with: right, or one sentence before any work is done."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from tests.sample.parts import tiny_pipeline_folder
from uvit.errors import UserError
from uvit.sample.pipeline import UViTPipeline

PROMPT = "a red circle"
EMBEDS = torch.zeros(1, 16, 32)
PIXELS = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": 3}, "prompt 3 must be a text, or a list of texts"),
        ({"prompt": [PROMPT, None]}, "prompt .* must be a text, or a list of texts"),
        ({"negative_prompt": 3}, "negative_prompt 3 must be a text"),
        ({"negative_prompt": "a", "negative_prompt_embeds": EMBEDS}, "negative_prompt and .* both given"),
        ({"negative_prompt": []}, "negative_prompt and negative_prompt_embeds are both missing"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 must be a whole number of at least 1"),
        ({"num_inference_steps": None}, "num_inference_steps None"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0 must be a whole number of at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan must be a finite number"),
        ({"guidance_scale": "3"}, "guidance_scale '3' must be a finite number"),
        ({"guidance_interval": 3}, "guidance_interval 3 must be two timesteps"),
        ({"guidance_interval": (9, 3)}, r"guidance_interval \(9, 3\) must be two timesteps, the lower one first"),
        ({"height": -4}, "height -4 must be a whole number"),
        ({"width": 16.0}, "width 16.0 must be a whole number"),
        ({"prompt_embeds": EMBEDS}, "prompt and prompt_embeds are both given"),
        ({"prompt": None, "prompt_embeds": [EMBEDS]}, "prompt_embeds must be a tensor .*, and is list"),
        ({"prompt": None, "prompt_embeds": EMBEDS.long()}, "prompt_embeds must be a tensor .*, and is torch.int64"),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"has shape \(16, 32\); \(number of prompts, 16, 32\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[:, :9]}, r"prompt_embeds has shape \(1, 9, 32\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[..., :9]}, r"prompt_embeds has shape \(1, 16, 9\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS / 0}, "prompt_embeds holds NaN or infinity"),
        ({"negative_prompt_embeds": EMBEDS.repeat(2, 1, 1)}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt_embeds": EMBEDS[:, :9]}, r"negative_prompt_embeds has shape \(1, 9, 32\)"),
        ({"generator": 3}, "generator 3 must be a torch.Generator"),
        ({"generator": [3]}, r"generator \[3\] must be a torch.Generator"),
        ({"generator": []}, "there are 0 generators for 1 images"),
        ({"generator": (torch.Generator(), torch.Generator())}, "there are 2 generators for 1 images"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor .*, and are ndarray"),
        ({"latents": torch.zeros(1, 4, 8, 8).long()}, "latents must be a tensor .*, and are torch.int64"),
        ({"latents": torch.zeros(4, 8, 8)}, r"latents have shape \(4, 8, 8\); \(1, 4, 8, 8\) is needed"),
        ({"image": torch.zeros(1, 3, 32, 32), "strength": "x"}, "strength 'x' must be a finite number"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents hold NaN or infinity"),
        ({"prompt": "a\ud800"}, "prompt 'a.ud800': is not Unicode text"),
        ({"image": "a.png"}, "image str must be a PIL image"),
        ({"image": []}, "image is an empty list"),
        ({"image": [None]}, "image NoneType must be a PIL image"),
        ({"image": Image.new("RGB", (0, 0))}, "must be a PIL image with pixels"),
        ({"image": np.full((32, 32, 3), 200, np.uint8)}, r"must be in \[0, 1\], and goes from 200 to 200; divide"),
        ({"image": torch.full((1, 3, 32, 32), torch.nan)}, r"image must be in \[0, 1\], and goes from nan to nan"),
        ({"image": np.zeros((32, 32))}, r"image has shape \(32, 32\); an array is \(B, H, W, 3\)"),
        ({"image": np.zeros((32, 32, 4))}, r"image has shape \(32, 32, 4\)"),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"image has shape \(1, 4, 8, 8\)"),
        ({"image": np.zeros((32, 32, 3), complex)}, r"image of complex128 and shape \(32, 32, 3\) is no image"),
        ({"image": PIXELS, "mask_image": torch.zeros(1, 4, 8, 8)}, r"mask_image has shape \(1, 4, 8, 8\); .* 1, H, W"),
        ({"image": PIXELS, "mask_image": Path("a.png")}, "mask_image PosixPath must be a PIL image"),
        ({"output_type": None}, "output_type None is none of 'pil', 'np', 'pt', 'latent'"),
        ({"eta": 0.5}, "eta 0.5: LimitedDPMSolverScheduler has none; leave it out, or use DDIM"),
        ({"eta": "x"}, "eta 'x' must be a finite number"),
        ({"timesteps": [999, 500]}, "timesteps: the scheduler spaces the steps"),
        ({"sigmas": [3.0]}, "sigmas: the scheduler spaces the steps"),
        ({"clip_skip": 1}, "clip_skip: the U-ViT is trained on the last hidden state"),
        ({"cross_attention_kwargs": {"scale": 1}}, "cross_attention_kwargs: a U-ViT has no cross-attention"),
        ({"guidance_rescale": 0.7}, "guidance_rescale: is not supported"),
        ({"ip_adapter_image": torch.zeros(1)}, "ip_adapter_image: there are no IP-Adapters"),
        ({"callback": print}, "callback: .* use callback_on_step_end"),
        ({"callback_steps": 1}, "callback_steps: .* use callback_on_step_end"),
        ({"num_inference_step": 3}, "num_inference_step: there is no such argument; did you mean num_inference_steps?"),
        ({"banana": None}, "banana: there is no such argument$"),
        ({"callback_on_step_end": 3}, "callback_on_step_end 3 must be a function"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs .*, in a list"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_before_any_work(
    pipeline: UViTPipeline, arguments: dict[str, Any], said: str
) -> None:
    ran = []
    hook = pipeline.unet.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError, match=said):
            pipeline(**{"prompt": PROMPT, "num_inference_steps": 1} | arguments)
    finally:
        hook.remove()
    assert not ran


def test_what_diffusers_leaves_out_may_be_passed(pipeline: UViTPipeline) -> None:
    none = ("timesteps", "sigmas", "clip_skip", "cross_attention_kwargs", "ip_adapter_image", "callback")
    options = {"num_inference_steps": 2, "output_type": "pt", "latents": torch.ones(1, 4, 8, 8)}
    plain = pipeline(PROMPT, **options).images
    same = pipeline((PROMPT,), **options, guidance_rescale=0.0, eta=0, **dict.fromkeys(none)).images
    assert torch.equal(plain, same)


def test_embeddings_of_another_type_and_negative_ones_for_all(pipeline: UViTPipeline) -> None:
    embeds = pipeline.encode_prompt([PROMPT, "two cats"])
    options = {"num_inference_steps": 2, "output_type": "pt", "latents": torch.ones(2, 4, 8, 8)}
    plain = pipeline([PROMPT, "two cats"], **options).images
    empty = pipeline.encode_prompt("")
    double = pipeline(prompt_embeds=embeds.double(), negative_prompt_embeds=empty.double(), **options).images
    assert torch.equal(plain, double)


def test_numbers_of_numpy_and_attention_slicing(pipeline: UViTPipeline) -> None:
    images = pipeline(
        PROMPT, num_inference_steps=np.int64(1), guidance_scale=np.float32(2), num_images_per_prompt=np.int32(2),
        callback_on_step_end_tensor_inputs=None,
    ).images  # fmt: skip
    assert len(images) == 2
    pipeline.disable_attention_slicing()
    with pytest.raises(ValueError, match="enable_attention_slicing: attention needs little memory here"):
        pipeline.enable_attention_slicing()


def test_eta_is_ddims(pipeline: UViTPipeline) -> None:
    before = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(before.config)
    options = {"num_inference_steps": 4, "output_type": "pt", "latents": torch.ones(1, 4, 8, 8)}

    def draw(**more: Any) -> torch.Tensor:
        return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options, **more).images

    try:
        assert torch.equal(draw(), draw(eta=0.0)) and torch.equal(draw(eta=1.0), draw(eta=1.0))
        assert not torch.allclose(draw(), draw(eta=1.0), atol=1e-3)
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_no_numbers(output_type: str, value: float, tmp_path: Path) -> None:
    pipeline = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        (pipeline.unet.norm if output_type == "latent" else pipeline.vqvae.decoder.conv_out).bias.fill_(value)
    with pytest.raises(UserError, match="'two cats': the image is NaN or infinite; in float16 try bfloat16"):
        pipeline(["two cats", PROMPT], num_inference_steps=1, output_type=output_type)
    embeds = pipeline.encode_prompt(PROMPT)
    with pytest.raises(UserError, match="image 0: the image is NaN"):
        pipeline(prompt_embeds=embeds, num_inference_steps=1, output_type=output_type)


def test_without_a_text_encoder(pipeline: UViTPipeline) -> None:
    without = UViTPipeline(**{**pipeline.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="prompt: the pipeline has no text encoder and tokenizer; pass prompt_embeds"):
        without(PROMPT)
