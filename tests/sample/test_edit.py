"""Pictures that drawing begins with: the right noise in every scheduler's scale, and what is to stay stays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.sample.parts import NAMES, gaussian_predictor, tiny_pipeline_folder
from uvit.diffusion import signal_and_noise
from uvit.sample.denoise import at_step, denoise, exact_timesteps
from uvit.sample.edit import first_step
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler
from uvit.weights.encoders import encode_images

ALL_NAMES = sorted({*NAMES, "official"})
SHAPE = (2, 4, 8, 8)
CONTEXT = torch.zeros(2, 5, 6)
MEAN = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded: UViTPipeline) -> UViTPipeline:
    loaded.scheduler = build_scheduler()
    return loaded


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(pipeline: UViTPipeline, **options) -> Tensor:  # type: ignore[no-untyped-def]
    fixed = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    return pipeline("two cats", **fixed | {"generator": generator} | options).images


def pixels_of(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


# On an analytic diffusion


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_picture_comes_back_where_it_is_all_there_is(name: str) -> None:
    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return IMAGE

    scheduler = build_scheduler(name)
    start = first_step(0.5, 20, scheduler.order)
    x_0 = denoise(
        predict, scheduler, NOISE, CONTEXT, CONTEXT, 1, 20, "sample", torch.Generator(), start=start, image=IMAGE
    )
    assert (x_0 - IMAGE).square().mean().sqrt() < (0.1 if name == "official" else 1e-4)  # that leaves a little noise


# DDPM adds noise of its own: there is no flow to follow. Those of first order err by 1/steps.
@pytest.mark.parametrize(
    ("name", "rms"), [("dpmsolver++", 0.003), ("unipc", 0.003), ("heun", 0.005), ("ddim", 0.02), ("euler", 0.02)]
)
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_begins_at_the_noise_level_that_the_network_is_told(name: str, strength: float, rms: float) -> None:
    """Anything else, or noise in another scale, would end elsewhere: the exact flow from that level is known."""
    scheduler, steps = build_scheduler(name), 200
    start = first_step(strength, steps, scheduler.order)
    predictor = gaussian_predictor(MEAN, 0.5, "epsilon")
    x_0 = denoise(predictor, scheduler, NOISE, CONTEXT, CONTEXT, 1, steps, "epsilon", start=start, image=IMAGE)
    a, s = signal_and_noise(exact_timesteps(scheduler)[start : start + 1], NOISE)
    exact = MEAN + 0.5 * (a * IMAGE + s * NOISE - a * MEAN) / (a**2 * 0.25 + s**2).sqrt()
    assert (x_0 - exact).square().mean().sqrt() < rms


@pytest.mark.parametrize("name", ALL_NAMES)
def test_noisy_latents_are_what_a_scheduler_s_own_steps_come_through(name: str) -> None:
    """Where the data is one point, every solver's path is x_0 with the same noise, at each step's level."""
    scheduler = build_scheduler(name)
    distances = []

    def predict(x_n: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return IMAGE

    def on_step(i: int, t: Tensor, latents: Tensor) -> Tensor:
        distances.append((latents - at_step(scheduler, i + 1, IMAGE, NOISE)).abs().max().item())
        return latents

    options = {"generator": torch.Generator(), "start": scheduler.order, "image": IMAGE, "on_step": on_step}
    denoise(predict, scheduler, NOISE, CONTEXT, CONTEXT, 1, 10, "sample", **options)
    assert len(distances) == len(scheduler.timesteps) - scheduler.order
    if name == "ddpm":
        return  # it adds noise of its own
    assert max(distances[:-1]) < 1e-4
    assert distances[-1] < (0.2 if name == "official" else 1e-4)  # which keeps the noise of timestep 1


def test_the_share_of_steps() -> None:
    assert [first_step(strength, 50, 1) for strength in (1, 0.8, 0.02)] == [0, 10, 49]
    assert first_step(0.29, 100, 2) == 142
    with pytest.raises(ValueError, match="of 50 steps is less than one step"):
        first_step(0.019, 50, 1)
    for strength in (0, -0.5, 1.01):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            first_step(strength, 50, 1)


# Through the pipeline


@pytest.mark.parametrize("name", ALL_NAMES)
def test_full_strength_is_drawing_from_noise_alone(pipeline: UViTPipeline, name: str) -> None:
    pipeline.scheduler = build_scheduler(name)
    assert torch.equal(draw(pipeline, image=picture(), strength=1.0), draw(pipeline))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_less_strength_stays_closer_to_the_picture(pipeline: UViTPipeline, name: str) -> None:
    pipeline.scheduler = build_scheduler(name)
    moments = encode_images(pipeline.vqvae, 2 * pixels_of(picture()) - 1)
    latents = 0.7 * moments[:, :4]
    drawn = [
        draw(pipeline, image=picture(), strength=s, output_type="latent", num_inference_steps=20)
        for s in (0.1, 0.5, 1.0)
    ]
    near, middle, far = ((x - latents).square().mean().sqrt() for x in drawn)
    assert near < middle < far


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_not_masked_stays(pipeline: UViTPipeline, name: str, strength: float) -> None:
    pipeline.scheduler = build_scheduler(name)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (11, 0, 32, 32))  # of the third of eight columns of latents a pixel's width is masked
    options = {"image": picture(), "mask_image": mask, "strength": strength}
    images, wanted = draw(pipeline, **options), pixels_of(picture())
    assert torch.allclose(images[..., :11], wanted[..., :11], atol=1e-6)
    assert (images[..., 11:] - wanted[..., 11:]).abs().mean() > 0.02
    (pil,) = draw(pipeline, **options, output_type="pil")
    assert np.array_equal(np.asarray(pil)[:, :11], np.asarray(picture())[:, :11])

    latents = draw(pipeline, **options, output_type="latent")
    with torch.no_grad():
        known = encode_images(pipeline.vqvae, 2 * wanted - 1)[:, :4] * 0.7
    assert torch.allclose(latents[..., :2], known[..., :2], atol=1e-6)
    assert (latents[..., 2:] - known[..., 2:]).abs().amax(dim=(0, 1, 2)).min() > 1e-3


def test_a_mask_of_everything_is_no_mask(pipeline: UViTPipeline) -> None:
    everything = Image.new("L", (32, 32), 255)
    masked = draw(pipeline, image=picture(), mask_image=everything)
    assert torch.equal(masked, draw(pipeline))  # with a mask, the strength is 1 unless it is said
    assert torch.equal(
        draw(pipeline, image=picture(), mask_image=everything, strength=0.8), draw(pipeline, image=picture())
    )


def test_the_repainted_part_sees_the_rest(pipeline: UViTPipeline) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    one, other = (draw(pipeline, image=picture(seed), mask_image=mask, output_type="latent") for seed in (0, 1))
    assert (one[..., 4:] - other[..., 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["np", "pt", "list"])
def test_pictures_come_as_they_go(pipeline: UViTPipeline, kind: str) -> None:
    pixels = pixels_of(picture())
    image = {"np": pixels.permute(0, 2, 3, 1).numpy(), "pt": pixels, "list": [picture()]}[kind]
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:] = 1
    whole = {"np": mask.permute(0, 2, 3, 1).numpy(), "pt": mask, "list": [Image.fromarray(mask[0, 0].numpy() > 0)]}
    wanted = draw(pipeline, image=picture(), mask_image=Image.fromarray(mask[0, 0].numpy() > 0))
    assert torch.allclose(draw(pipeline, image=image, mask_image=whole[kind]), wanted, atol=1e-5)


def test_a_mask_of_booleans(pipeline: UViTPipeline) -> None:
    mask = np.zeros((32, 32), bool)
    mask[:, 8:] = True
    wanted = draw(pipeline, image=picture(), mask_image=Image.fromarray(mask))
    for kind in (mask, mask.astype(np.uint8), torch.from_numpy(mask)[None]):
        assert torch.equal(draw(pipeline, image=picture(), mask_image=kind), wanted)


def test_other_sizes_are_scaled_and_transparency_is_white(pipeline: UViTPipeline) -> None:
    plain, large = (Image.new("RGB", size, (200, 100, 50)) for size in ((32, 32), (50, 41)))
    assert torch.allclose(draw(pipeline, image=plain), draw(pipeline, image=large), atol=1e-5)
    empty = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    assert torch.equal(draw(pipeline, image=empty), draw(pipeline, image=white))


def test_each_prompt_has_its_picture(pipeline: UViTPipeline) -> None:
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    fixed = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 1.0}
    prompts, images = ["two cats", "a red circle"], [picture(0), picture(1)]
    together = pipeline(prompts, image=images, num_images_per_prompt=2, latents=noise, **fixed).images
    for i in range(4):
        alone = pipeline(prompts[i // 2], image=images[i // 2], latents=noise[i : i + 1], **fixed).images
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    with pytest.raises(ValueError, match="3 images for 2 images to generate"):
        pipeline(prompts, image=[picture()] * 3, **fixed)
    with pytest.raises(ValueError, match="2 masks for 1 images to generate"):
        pipeline(prompts[0], image=picture(), mask_image=[Image.new("L", (32, 32))] * 2, **fixed)


def test_what_needs_a_picture_says_so(pipeline: UViTPipeline) -> None:
    with pytest.raises(ValueError, match=r"strength 0\.5 needs an image"):
        draw(pipeline, strength=0.5)
    with pytest.raises(ValueError, match="mask_image needs an image"):
        draw(pipeline, mask_image=Image.new("L", (32, 32)))
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"strength {strength} must be"):
            draw(pipeline, image=picture(), strength=strength)


def test_callback_counts_the_steps_that_are_done(pipeline: UViTPipeline) -> None:
    steps = []

    def callback(pipe: UViTPipeline, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(i)
        return values

    draw(pipeline, image=picture(), strength=0.5, callback_on_step_end=callback)
    assert steps == [0, 1, 2]


def test_a_picture_takes_no_noise_from_the_seed(pipeline: UViTPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    draw(pipeline, image=picture(), generator=generator)
    after = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 8, 8, generator=after)
    assert torch.equal(generator.get_state(), after.get_state())


def test_half_precision(pipeline: UViTPipeline, tmp_path: Path) -> None:
    low = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path), dtype=torch.bfloat16)
    low.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    images = draw(low, image=picture(), mask_image=mask)
    assert images.dtype == torch.float32
    assert torch.allclose(images[..., :16], pixels_of(picture())[..., :16], atol=1e-6)
