"""What sampling needs of a U-ViT travels with it; and a VAE is decoded as the pipelines of diffusers do it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from tests.sample.parts import tiny_pipeline_folder
from tests.tiny import tiny_vae_folder
from uvit import UViTPipeline, UViTT2IModel
from uvit.conventions import Conventions, recorded_conventions
from uvit.errors import UserError
from uvit.weights.encoders import load_diffusers_vae

PROMPT = "a red circle on a blue background"
MEAN, STD = [0.3, -0.2, 0.1, 0.5], [0.5, 2.0, 1.5, 0.8]
VAES: dict[str, dict[str, Any]] = {
    "scale": {"scaling_factor": 0.4},
    "shift": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "mean and std": {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
    "mean alone": {"scaling_factor": 0.5, "latents_mean": MEAN},
    "groups": {"scaling_factor": 0.4, "shift_factor": -0.3, "norm_num_groups": 2},
    "no quant convs": {"shift_factor": 0.2, "use_quant_conv": False, "use_post_quant_conv": False},
}


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """As the pipelines of Stable Diffusion XL and 3 do it."""
    config = vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = (latents / config.scaling_factor) + (config.shift_factor or 0.0)
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def encoded(vae: Any, images: Tensor) -> Tensor:
    config = vae.config
    latents = vae.encode(2 * images - 1).latent_dist.mode()
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"), "v_prediction", latent_scale=0.7)


@pytest.fixture
def pipeline(folder: Path) -> UViTPipeline:
    return opened(folder)


def opened(folder: Path, **components: Any) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(folder, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: UViTPipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 4, "output_type": "pt"} | options
    return pipeline(PROMPT, **options).images


def fresh_unet(**conventions: Any) -> UViTT2IModel:
    sizes: dict[str, Any] = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    torch.manual_seed(0)
    return UViTT2IModel(**sizes, clip_dim=32, num_text_tokens=16, **conventions).eval()


@pytest.mark.parametrize("settings", VAES.values(), ids=VAES)
def test_pixels_are_those_of_diffusers(pipeline: UViTPipeline, settings: dict[str, Any], tmp_path: Path) -> None:
    vae = load_diffusers_vae(str(tiny_vae_folder(tmp_path / "vae", **settings)))
    parts = {**pipeline.components, "vqvae": vae, "unet": fresh_unet()}
    made = UViTPipeline(**parts)
    latents = draw(made, output_type="latent")
    expected = decoded(vae, latents)
    assert torch.allclose(draw(made), expected, atol=1e-5)

    # An image to begin with: of one step at hardly any noise, its latents come back.
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 32, 32)
    kept = draw(made, image=image, mask_image=mask, output_type="latent")
    assert torch.allclose(kept, encoded(vae, image), atol=1e-4)

    # And from a folder, by itself or with another VAE of the same latents.
    made.save_pretrained(tmp_path / "pipeline")
    again = opened(tmp_path / "pipeline")
    assert again.conventions == made.conventions and torch.equal(draw(again), draw(made))
    assert torch.equal(draw(UViTPipeline(**again.components)), draw(made))


def test_default_latents_are_bit_exact() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(Conventions(0.7).normalize(x), 0.7 * x) and torch.equal(Conventions(0.7).denormalize(x), x / 0.7)
    zero = Conventions(0.7).denormalize(torch.tensor([[[[-0.0]]]]))
    assert torch.signbit(zero).all()


@pytest.mark.parametrize("way", ["components", "from_pipe", "unet alone", "compiled", "saved unet", "passed unet"])
def test_no_way_of_putting_components_together_loses_anything(folder: Path, way: str, tmp_path: Path) -> None:
    pipeline = opened(folder)
    expected, conventions = draw(pipeline), pipeline.conventions
    assert (conventions.latent_scale, conventions.prediction_type) == (0.7, "v_prediction")
    if way == "components":
        other = UViTPipeline(**pipeline.components)
    elif way == "from_pipe":
        other = UViTPipeline.from_pipe(pipeline)
    elif way == "compiled":
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
        pipeline.save_pretrained(tmp_path / "saved")
        other = opened(tmp_path / "saved")
    elif way == "passed unet":  # into a pipeline of another model
        host = tiny_pipeline_folder(tmp_path, "epsilon", latent_scale=0.3)
        other = opened(host, unet=pipeline.unet, vqvae=pipeline.vqvae)
        assert opened(host).conventions.latent_scale == 0.3
    else:
        source = folder / "unet"
        if way == "saved unet":
            pipeline.unet.save_pretrained(tmp_path / "unet")
            source = tmp_path / "unet"
        unet = UViTT2IModel.from_pretrained(source)
        parts = {**pipeline.components, "unet": unet}
        other = UViTPipeline(**parts)
    assert other.conventions == conventions and other.config.latent_scale == 0.7
    assert torch.allclose(draw(other), expected, atol=1e-6)


def test_a_u_vit_that_is_replaced_brings_its_own(pipeline: UViTPipeline, tmp_path: Path) -> None:
    pipeline.unet = fresh_unet(latent_scale=0.3, prediction_type="sample")
    assert pipeline.conventions == Conventions(0.3, prediction_type="sample") == Conventions.recorded(pipeline.config)
    pipeline.save_pretrained(tmp_path)
    again = opened(tmp_path)
    assert again.conventions == pipeline.conventions and torch.equal(draw(again), draw(pipeline))
    assert UViTPipeline.from_pipe(opened(tmp_path), unet=fresh_unet(latent_scale=0.9)).conventions.latent_scale == 0.9


def test_what_contradicts_the_u_vit_is_refused(pipeline: UViTPipeline, folder: Path, tmp_path: Path) -> None:
    parts = pipeline.components
    wrong: list[dict[str, Any]] = [
        {"latent_scale": 0.3},
        {"prediction_type": "epsilon"},
        {"timestep_labels": "0..999"},
        {"latent_shift": 0.1},
        {"latent_std": (1, 2, 3, 4)},
    ]
    for given in wrong:
        (key,) = given
        with pytest.raises(ValueError, match=f"{key} is .* here, but .* in the U-ViT's own config"):
            UViTPipeline(**parts, **given)
    for given, says in (
        ({"prediction_type": "flow"}, "prediction_type 'flow' is none of 'epsilon', 'v_prediction', 'sample'"),
        ({"timestep_labels": "1..100"}, "timestep_labels '1..100' is none of"),
        ({"latent_scale": 0.0}, "latent_scale is 0.0, but must be above 0"),
        ({"latent_scale": "a"}, "latent_scale is 'a', but must be above 0"),
        ({"latent_scale": 1.0, "latent_shift": float("nan")}, "latent_shift is nan, but must be a number"),
        ({"latent_scale": 1.0, "latent_shift": (1.0, 2.0)}, "latent_shift has 2 numbers, but the latents have 4"),
    ):
        with pytest.raises(ValueError, match=says):
            UViTPipeline(**{**parts, "unet": fresh_unet()}, **given)
    UViTPipeline(**parts, latent_scale=0.7, prediction_type="v_prediction")
    pipeline.register_to_config(latent_scale=0.3)  # on purpose
    assert pipeline.unet.config.latent_scale == 0.3 == pipeline.config.latent_scale


def test_another_vae(pipeline: UViTPipeline, tmp_path: Path) -> None:
    """One of the same latents is decoded as the U-ViT was trained, whatever its scaling_factor."""
    expected = draw(pipeline)
    pipeline.vqvae = load_diffusers_vae(str(tiny_vae_folder(tmp_path / "same", scaling_factor=0.9)))
    assert torch.equal(draw(pipeline), expected)
    shifted = load_diffusers_vae(str(tiny_vae_folder(tmp_path / "shifted", shift_factor=0.1)))
    made = UViTPipeline(**{**pipeline.components, "unet": fresh_unet(), "vqvae": shifted})
    made.save_pretrained(tmp_path / "made")
    made = opened(tmp_path / "made")
    made.vqvae = pipeline.vqvae
    with pytest.raises(
        ValueError, match=r"trained with latent scale 0\.5, shift 0\.1 of its VAE's latents, but .* 0\.9"
    ):
        draw(made)


def test_a_pipeline_of_an_older_version_has_no_shift(folder: Path, tmp_path: Path) -> None:
    unet = fresh_unet()
    assert recorded_conventions(unet.config) == {}
    vae = load_diffusers_vae(str(tiny_vae_folder(tmp_path / "vae", shift_factor=0.1)))
    parts = {**opened(folder).components, "unet": unet, "vqvae": vae}
    older = UViTPipeline(**parts, latent_scale=0.7, prediction_type="epsilon", timestep_labels="1..1000")
    assert older.conventions == Conventions(0.7)
    older.save_pretrained(tmp_path / "pipeline")
    assert opened(tmp_path / "pipeline").conventions == Conventions(0.7)


def test_schedulers_of_other_prediction_types_give_the_same(pipeline: UViTPipeline) -> None:
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing"}
    images = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        pipeline.scheduler = DDIMScheduler.from_config(config, prediction_type=prediction_type)
        images.append(draw(pipeline))
    assert torch.allclose(images[0], images[1], atol=1e-4) and torch.allclose(images[0], images[2], atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "settings", "says"),
    [
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "use_flow_sig"),
        (
            DPMSolverMultistepScheduler,
            {"prediction_type": "flow_prediction"},
            "expects prediction type flow_prediction",
        ),
        (DDIMScheduler, {"thresholding": True}, "thresholding=True"),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}, "timestep_type='continuous'"),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        (DDPMScheduler, {"variance_type": "learned"}, "expects a variance"),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}, "another noise schedule"),
        (DDIMInverseScheduler, {}, "leads from images to noise"),
    ],
)
def test_schedulers_of_other_processes_are_refused(
    pipeline: UViTPipeline, cls: Any, settings: dict[str, Any], says: str
) -> None:
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **settings)
    with pytest.raises(ValueError, match=says):
        draw(pipeline)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shift_factor": 0.1, "latents_mean": MEAN, "latents_std": STD}, "both a shift_factor and latents_mean"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "3 numbers, but the latents have 4 channels"),
        ({"latents_mean": MEAN, "latents_std": [1, 0, 1, 1]}, "must be above 0"),
        ({"scaling_factor": None}, "must be above 0"),
    ],
)
def test_a_vae_that_contradicts_itself(pipeline: UViTPipeline, settings: Any, says: str, tmp_path: Path) -> None:
    vae = load_diffusers_vae(str(tiny_vae_folder(tmp_path, **settings)))
    with pytest.raises(UserError, match=f"the config.json of the VAE cannot be used: .*{says}"):
        UViTPipeline(**{**pipeline.components, "unet": fresh_unet(), "vqvae": vae})
