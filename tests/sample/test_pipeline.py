import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

import uvit
from tests.sample.parts import tiny_pipeline_folder
from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.sample.pipeline import UViTPipeline
from uvit.weights.encoders import decode_latents

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipeline(folder: Path) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline: UViTPipeline, prompt: str | list[str] | None = PROMPT, **options) -> Tensor:  # type: ignore[no-untyped-def]
    options = {"generator": seeded(), "num_inference_steps": 4, "output_type": "pt"} | options
    return pipeline(prompt, **options).images


def test_output_types(pipeline: UViTPipeline) -> None:
    (pil,) = draw(pipeline, output_type="pil")
    array = draw(pipeline, output_type="np")
    tensor = draw(pipeline)
    assert (pil.size, pil.mode) == ((32, 32), "RGB")
    assert array.shape == (1, 32, 32, 3)
    assert tensor.shape == (1, 3, 32, 32)
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert np.array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert np.abs(np.asarray(pil) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert pipeline(PROMPT, num_inference_steps=1, return_dict=False)[0][0].size == (32, 32)


def test_latents_are_decoded_with_the_stored_scale(pipeline: UViTPipeline) -> None:
    latents = draw(pipeline, output_type="latent")
    images = decode_latents(pipeline.vqvae, latents, LatentSpace(0.7))
    assert torch.allclose(draw(pipeline), (images + 1) / 2, atol=1e-5)
    pipeline.register_to_config(latent_scale=0.3)
    assert not torch.allclose(draw(pipeline), (images + 1) / 2, atol=1e-2)


def test_prompt_and_guidance_count(pipeline: UViTPipeline) -> None:
    assert not torch.allclose(draw(pipeline), draw(pipeline, "two cats"), atol=1e-2)
    assert not torch.allclose(draw(pipeline), draw(pipeline, guidance_scale=3), atol=1e-2)


def test_guidance_one_is_the_conditional_prediction_alone(pipeline: UViTPipeline) -> None:
    batches = []
    pipeline.unet.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    alone = draw(pipeline, guidance_scale=1)
    assert set(batches) == {1}
    assert torch.allclose(alone, draw(pipeline, guidance_scale=1, negative_prompt="two cats"))
    # Without and with the second pass; the limit is the same.
    assert torch.allclose(alone, draw(pipeline, guidance_scale=1 + 1e-7), atol=1e-4)
    assert set(batches) == {1, 2}


def test_negative_prompt(pipeline: UViTPipeline) -> None:
    plain = draw(pipeline)
    assert torch.allclose(plain, draw(pipeline, negative_prompt=""))
    assert not torch.allclose(plain, draw(pipeline, negative_prompt="two cats"), atol=1e-2)
    # What is asked for and what is avoided are the same: guidance cancels.
    same = draw(pipeline, negative_prompt=PROMPT)
    assert torch.allclose(same, draw(pipeline, guidance_scale=1), atol=1e-4)
    with pytest.raises(ValueError, match="2 negative prompts for 1 prompts"):
        draw(pipeline, negative_prompt=["a", "b"])


def test_images_of_a_prompt_follow_one_another(pipeline: UViTPipeline) -> None:
    noise = torch.randn(4, 4, 8, 8, generator=seeded(1))
    prompts, negative = [PROMPT, "two cats"], ["", "green"]
    images = draw(pipeline, prompts, negative_prompt=negative, num_images_per_prompt=2, latents=noise)
    assert len(images) == 4
    for i in range(4):
        alone = draw(pipeline, prompts[i // 2], negative_prompt=negative[i // 2], latents=noise[i : i + 1])
        assert torch.allclose(images[i], alone[0], atol=1e-4)


def test_generators_and_latents(pipeline: UViTPipeline) -> None:
    first, second = draw(pipeline, generator=seeded(1)), draw(pipeline, generator=seeded(2))
    assert torch.equal(first, draw(pipeline, generator=seeded(1)))
    assert not torch.allclose(first, second, atol=1e-2)
    both = draw(pipeline, num_images_per_prompt=2, generator=[seeded(1), seeded(2)])
    assert torch.allclose(both, torch.cat([first, second]), atol=1e-4)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1))
    assert torch.equal(first, draw(pipeline, latents=noise, generator=None))
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        draw(pipeline, num_images_per_prompt=2, generator=[seeded(1)])
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 4\); \(1, 4, 8, 8\)"):
        draw(pipeline, latents=torch.zeros(1, 4, 4, 4))


def test_embeddings_instead_of_prompts(pipeline: UViTPipeline) -> None:
    context, empty = pipeline.encode_prompt([PROMPT]), pipeline.encode_prompt("")
    assert context.shape == (1, 16, 32)
    drawn = draw(pipeline, None, prompt_embeds=context, negative_prompt_embeds=empty)
    assert torch.equal(drawn, draw(pipeline))
    with pytest.raises(ValueError, match="both missing"):
        draw(pipeline, None)
    with pytest.raises(ValueError, match="both given"):
        draw(pipeline, PROMPT, prompt_embeds=context)


def test_other_sizes(pipeline: UViTPipeline) -> None:
    assert draw(pipeline, height=16, width=24).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="multiples of 4"):
        draw(pipeline, height=30)
    with pytest.raises(ValueError, match="64x32"):  # pixels / 4 = 16x8 latents, 8x4 patches
        pipeline(PROMPT, height=256, width=128)


def test_unknown_output_type(pipeline: UViTPipeline) -> None:
    with pytest.raises(ValueError, match="output_type 'jpg'"):
        draw(pipeline, output_type="jpg")


def test_callback_sees_and_changes_the_latents(pipeline: UViTPipeline) -> None:
    steps = []

    def callback(pipe: UViTPipeline, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is pipeline
        steps.append(i)
        return {"latents": values["latents"] * 0} if i == 3 else values

    latents = draw(pipeline, callback_on_step_end=callback, output_type="latent")
    assert steps == [0, 1, 2, 3]
    assert (latents == 0).all()


def test_callback_may_leave_the_latents_alone(pipeline: UViTPipeline) -> None:
    seen = draw(pipeline, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=["latents"])
    assert torch.equal(seen, draw(pipeline))
    with pytest.raises(ValueError, match=r"\['timesteps'\]: there are only latents, prompt_embeds"):
        draw(pipeline, callback_on_step_end_tensor_inputs=["latents", "timesteps"])


def test_nothing_to_draw(pipeline: UViTPipeline) -> None:
    with pytest.raises(ValueError, match="both missing"):
        draw(pipeline, [])
    with pytest.raises(ValueError, match="num_inference_steps 0"):
        pipeline(PROMPT, num_inference_steps=0)


def test_parts_of_another_model_are_refused(pipeline: UViTPipeline) -> None:
    parts = dict(pipeline.components)
    wide = UViTT2IModel(**{**pipeline.unet.config, "clip_dim": 48})
    deep = UViTT2IModel(**{**pipeline.unet.config, "in_channels": 8})
    pipeline.tokenizer.add_tokens("elephant")
    for unet, message in (
        (wide, "32 wide, but .* 48"),
        (deep, "4 channels, but .* 8"),
        (parts["unet"], "the text encoder has"),
    ):
        with pytest.raises(ValueError, match=message):
            UViTPipeline(**{**parts, "unet": unet})


def test_who_gives_contexts_needs_no_text_encoder(pipeline: UViTPipeline, tmp_path: Path) -> None:
    contexts = {"prompt_embeds": pipeline.encode_prompt(PROMPT), "negative_prompt_embeds": pipeline.encode_prompt("")}
    pipeline.save_pretrained(tmp_path)
    without = UViTPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert torch.equal(draw(without, None, **contexts), draw(pipeline))


def test_a_warning_quotes_the_beginning(pipeline: UViTPipeline) -> None:
    with pytest.warns(UserWarning, match="cut off") as warned:
        pipeline.encode_prompt("a red circle " * 500)
    assert len(str(warned[0].message)) < 350


def test_too_long_a_prompt_warns_of_what_is_cut(pipeline: UViTPipeline) -> None:
    fitting = "a red circle"
    with pytest.warns(UserWarning, match="reads 16 tokens; cut off: .*elephant"):
        context = pipeline.encode_prompt([fitting, "a red circle " * 6 + "elephant"])
    assert context.shape == (2, 16, 32)
    assert torch.equal(context[:1], pipeline.encode_prompt(fitting))  # without a warning, which would be an error


def test_what_is_cut_is_said_once_for_each_text(pipeline: UViTPipeline) -> None:
    with pytest.warns(UserWarning, match="cut off") as warned:
        pipeline.encode_prompt(["a red circle " * 6] * 3)
    assert len(warned) == 1


def test_memory_options_draw_the_same(pipeline: UViTPipeline) -> None:
    plain = draw(pipeline, num_images_per_prompt=2)
    pipeline.enable_vae_slicing()
    pipeline.enable_vae_tiling()
    assert (pipeline.vqvae.use_slicing, pipeline.vqvae.use_tiling) == (True, True)
    assert torch.allclose(draw(pipeline, num_images_per_prompt=2), plain, atol=1e-5)
    pipeline.disable_vae_slicing()
    pipeline.disable_vae_tiling()
    assert (pipeline.vqvae.use_slicing, pipeline.vqvae.use_tiling) == (False, False)


def test_networks_that_take_turns_draw_the_same(pipeline: UViTPipeline) -> None:
    picture, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    plain, repainted = draw(pipeline), draw(pipeline, image=picture, mask_image=mask)
    pipeline.enable_model_cpu_offload(device="cpu")  # its hooks, without a GPU
    for _ in range(2):
        assert torch.equal(draw(pipeline), plain)
        assert torch.equal(draw(pipeline, image=picture, mask_image=mask), repainted)


def test_save_and_load_give_the_identical_image(pipeline: UViTPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "copy")
    copy = UViTPipeline.from_pretrained(tmp_path / "copy")
    assert copy.config.latent_scale == 0.7
    assert copy.config.prediction_type == "epsilon"
    assert torch.equal(draw(pipeline), draw(copy))


def test_both_public_names_open_a_folder_of_either(pipeline: UViTPipeline, folder: Path, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "old")
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    index["_class_name"] = "LDMTextToImageUViTPipeline"
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    for cls in (uvit.UViTPipeline, uvit.LDMTextToImageUViTPipeline):
        for place in (folder, tmp_path / "old"):
            assert torch.equal(draw(cls.from_pretrained(place)), draw(pipeline))


def test_prediction_type_of_the_folder_is_used(pipeline: UViTPipeline, tmp_path: Path) -> None:
    other = UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path, "v_prediction"))
    assert other.scheduler.config.prediction_type == "epsilon"
    assert not torch.allclose(draw(other), draw(pipeline), atol=1e-2)


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_scheduler_swaps_in_diffusers_way(pipeline: UViTPipeline, cls: type) -> None:
    before = draw(pipeline, num_inference_steps=100, guidance_scale=1)
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    after = draw(pipeline, num_inference_steps=100, guidance_scale=1)
    assert not torch.equal(before, after)
    assert torch.isfinite(after).all()


def test_a_scheduler_of_another_process_is_refused(pipeline: UViTPipeline) -> None:
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="from_config"):
        draw(pipeline)


def test_pickled_weights_may_ask_for_nothing(pipeline: UViTPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        b"\x80\x02" + f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode()
    )
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.bin: .*os.system"):
        UViTPipeline.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_low_precision_draws_nearly_the_same(pipeline: UViTPipeline) -> None:
    full = draw(pipeline, guidance_scale=1)
    low = draw(pipeline.to(torch.bfloat16), guidance_scale=1)
    assert low.dtype == torch.float32
    assert (full - low).abs().mean() < 0.05


def test_pil_image_is_the_library_s(pipeline: UViTPipeline) -> None:
    assert isinstance(draw(pipeline, output_type="pil")[0], Image.Image)
