"""Callbacks, `_interrupt` and `_guidance_scale` do what they do in StableDiffusionPipeline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from tests.sample.parts import tiny_pipeline_folder
from uvit.sample.callbacks import CALLBACK_TENSORS
from uvit.sample.pipeline import UViTPipeline

STEPS = 5


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline")))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(ours: UViTPipeline) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32)
    tokenizer = ours.tokenizer
    tokenizer.model_max_length = 16
    pipeline = StableDiffusionPipeline(
        vae, ours.text_encoder, tokenizer, unet, ours.scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, callback: Callable[..., Any] | None, **options: Any) -> dict[str, Any]:
    """What the network was called with at each step, and the latents in the end."""
    batches: list[int] = []
    seen: list[dict[str, Any]] = []

    def recorded(pipe: Any, i: int, t: Tensor, values: dict[str, Any]) -> Any:
        shapes = {name: None if value is None else len(value) for name, value in values.items()}
        seen.append({"i": i, "t": int(t), "num_timesteps": pipe.num_timesteps} | shapes)
        return values if callback is None else callback(pipe, i, t, values)

    hook = pipeline.unet.register_forward_hook(
        lambda module, args, kwargs, output: batches.append(len(args[0])), with_kwargs=True
    )
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"} | options
    options |= {"latents": torch.ones(2, 4, 8, 8), "callback_on_step_end_tensor_inputs": list(CALLBACK_TENSORS)}
    try:
        latents = pipeline(["a red circle", "two cats"], callback_on_step_end=recorded, **options).images
    finally:
        hook.remove()
    return {"batches": batches, "seen": seen, "zero": bool((latents == 0).all()), "interrupt": pipeline.interrupt}


def interrupts(pipe: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = i == 2
    return values


def zeroes(pipe: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    return {"latents": values["latents"] * 0} if i == STEPS - 1 else {}


def ends_guidance(pipe: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """The recipe of diffusers' documentation for dynamic guidance."""
    if i == int(pipe.num_timesteps * 0.4):
        pipe._guidance_scale = 0.0
        values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
    return values


@pytest.mark.parametrize("callback", [None, interrupts, zeroes, ends_guidance])
def test_the_same_happens_as_in_stable_diffusion(
    ours: UViTPipeline, theirs: StableDiffusionPipeline, callback: Any
) -> None:
    found, wanted = run(ours, callback), run(theirs, callback)
    assert found == wanted
    assert not run(ours, None)["interrupt"]  # an interruption ends with its call


def test_without_guidance(ours: UViTPipeline, theirs: StableDiffusionPipeline) -> None:
    found = run(ours, None, guidance_scale=1.0)
    assert found["batches"] == run(theirs, lambda *_: {}, guidance_scale=1.0)["batches"] == [2] * STEPS
    assert found["seen"][0]["prompt_embeds"] == 2 and found["seen"][0]["negative_prompt_embeds"] is None


def draw(pipeline: UViTPipeline, callback: Any, **options: Any) -> Tensor:
    return pipeline(
        "a red circle", num_inference_steps=STEPS, latents=torch.ones(1, 4, 8, 8), output_type="latent",
        callback_on_step_end=callback, **options,
    ).images  # fmt: skip


def test_what_a_callback_changes_counts(ours: UViTPipeline) -> None:
    plain = draw(ours, None, guidance_scale=3.0)
    assert torch.equal(plain, draw(ours, lambda *_: None, guidance_scale=3.0))

    def other_scale(pipe: UViTPipeline, i: int, t: Tensor, values: dict[str, Any]) -> None:
        pipe._guidance_scale = 1.0

    def other_prompt(pipe: UViTPipeline, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"].flip(0)}

    assert not torch.allclose(plain, draw(ours, other_scale, guidance_scale=3.0), atol=1e-3)
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert not torch.allclose(plain, draw(ours, other_prompt, guidance_scale=3.0, **names), atol=1e-3)


def test_callbacks_of_diffusers(ours: UViTPipeline) -> None:
    batches = []
    hook = ours.unet.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    draw(ours, SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1), guidance_scale=3.0)
    hook.remove()
    assert batches == [2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (3, "returned an int; return None, or a dict of latents"),
        ({"timesteps": 3}, r"returned the keys \['timesteps'\]"),
        ({"latents": None}, "returned latents of type NoneType"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"returned latents of shape \(1, 4, 4, 4\); \(1, 4, 8, 8\) is needed"),
        ({"prompt_embeds": torch.zeros(3, 16, 32)}, r"returned prompt_embeds of shape \(3, 16, 32\)"),
    ],
)
def test_what_a_callback_may_not_return(ours: UViTPipeline, returned: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"callback_on_step_end {said}"):
        draw(ours, lambda *_: returned)
