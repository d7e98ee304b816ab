"""Each extractor prepares images as its protocol does, on tiny networks of the real classes; mistakes are sentences."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from tests.evaluate.networks import CLIP_PROCESSOR, TINY, tiny_clip_folder
from tests.evaluate.reference import formula_weights, synthetic_image
from tests.tiny import CAPTIONS
from uvit.errors import UserError
from uvit.evaluate.extractors import (
    clip_extractor,
    clip_pixels,
    cmmd_extractor,
    cmmd_pixels,
    dinov2_extractor,
    dinov2_pixels,
    folder_extractor,
    inception_extractor,
)
from uvit.evaluate.inception import FIDInception
from uvit.io import write_json

VIT_PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
IMAGES = [synthetic_image(40, 60, 1), synthetic_image(181, 90, 2), synthetic_image(5, 7, 3)]


def save(path: Path, model: Any, processor: dict[str, Any] | None = None) -> str:
    model.save_pretrained(path)
    if processor is not None:
        write_json(path / "preprocessor_config.json", processor)
    return str(path)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_folder(tmp_path_factory.mktemp("extractors") / "my-clip")


def vit(pooler: bool = True) -> Any:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**TINY, image_size=32, patch_size=8), add_pooling_layer=pooler)


# What images become


@pytest.mark.parametrize(
    "shape", [(224, 224), (181, 256), (256, 171), (30, 31), (31, 30), (700, 333), (225, 224), (320, 350), (214, 321)]
)
def test_clip_pixels_are_those_of_its_processor(shape: tuple[int, int], tmp_path: Path) -> None:
    write_json(
        tmp_path / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
        },
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = synthetic_image(*shape, 1)
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip_pixels(image), expected, rtol=0, atol=1e-6)


def test_cmmd_crops_and_then_resizes() -> None:
    image = synthetic_image(60, 100, 1)
    assert torch.equal(cmmd_pixels(image, 48), cmmd_pixels(np.ascontiguousarray(image[:, 20:80]), 48))
    square = synthetic_image(336, 336, 1)
    assert torch.equal(cmmd_pixels(square), clip_pixels(square, 336))


def test_dinov2_sees_the_whole_image() -> None:
    image = np.zeros((50, 400, 3), np.uint8)
    image[:, -100:] = 255
    pixels = dinov2_pixels(image)
    assert pixels.shape == (3, 224, 224) and (pixels[:, :, :160] < 0).all() and (pixels[:, :, 175:] > 0).all()


# Networks


def test_inception(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = FIDInception().state_dict()
    torch.save(formula_weights(names), tmp_path / "weights.pth")
    extractor = inception_extractor(str(tmp_path / "weights.pth"), "clean-fid")
    assert extractor.name == "inception-clean-fid" and extractor.distance == "FD-inception"  # not the published file
    outputs = extractor.outputs(torch.stack([extractor.preprocess(image) for image in IMAGES[:2]]))
    assert outputs["features"].shape == (2, extractor.width) and outputs["logits"].shape == (2, 1008)
    assert torch.equal(extractor(IMAGES[:2]), outputs["features"])


def test_clip_embeds_images_and_texts_as_transformers_does(clip_folder: Path) -> None:
    extractor = clip_extractor(str(clip_folder))
    model, processor = CLIPModel.from_pretrained(clip_folder), AutoImageProcessor.from_pretrained(clip_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    pixels = processor([Image.fromarray(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
    captions = [*CAPTIONS, "", "a red circle " * 20]  # the last is longer than the text encoder takes
    ids = tokenizer(captions, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_image_features(pixels).pooler_output
        expected_texts = model.get_text_features(**ids).pooler_output
    # One float32 rounding in the preprocessing.
    torch.testing.assert_close(extractor(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert extractor.texts is not None and extractor.width == 12
    torch.testing.assert_close(extractor.texts(captions), expected_texts, rtol=1e-5, atol=1e-6)
    alone = torch.cat([extractor.texts([caption]) for caption in captions])  # without padding
    torch.testing.assert_close(alone, expected_texts, rtol=1e-4, atol=1e-5)


def test_cmmd_reads_the_image_tower_of_a_whole_clip(clip_folder: Path) -> None:
    extractor, whole = cmmd_extractor(str(clip_folder)), clip_extractor(str(clip_folder))
    square = [synthetic_image(48, 48, 1)]  # on squares both prepare alike
    torch.testing.assert_close(extractor(square), whole(square))
    assert extractor.name == "cmmd-my-clip" and extractor.width == 12


def test_dinov2_scales_positions_as_its_own_code_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(**{**TINY, "image_size": 518, "patch_size": 14})
    model = Dinov2Model(config)
    model.embeddings.position_embeddings.data.normal_()
    folder = save(tmp_path / "dino", model)
    extractor = dinov2_extractor(folder)
    features = extractor(IMAGES)
    assert features.shape == (3, 32) and extractor.width == 32 and extractor.distance == "FD-dino"
    # Their code: bicubic by the factor (16 + 0.1) / 37; transformers interpolates to 16 x 16.
    positions = model.embeddings.position_embeddings.detach()
    grid = positions[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, mode="bicubic", scale_factor=(16.1 / 37, 16.1 / 37))
    scaled = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 32)], 1)
    pixels = torch.stack([dinov2_pixels(image) for image in IMAGES])
    with torch.inference_mode():
        plain = model.eval()(pixels).pooler_output
        model.embeddings.position_embeddings.data = scaled
        expected = model(pixels).pooler_output
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert (features - plain).abs().max() > 1e-4


def test_dinov2_of_another_position_grid(tmp_path: Path) -> None:
    model = Dinov2Model(Dinov2Config(**{**TINY, "image_size": 224, "patch_size": 14}))
    assert dinov2_extractor(save(tmp_path / "dino", model))(IMAGES).shape == (3, 32)


@pytest.mark.parametrize("kind", ["vit", "vit_without_pooler", "convnext", "clip"])
def test_any_folder_of_a_vision_model(kind: str, clip_folder: Path, tmp_path: Path) -> None:
    folder, width = str(tmp_path / "mymodel"), 32
    if kind == "convnext":
        config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
        save(tmp_path / "mymodel", ConvNextModel(config), VIT_PROCESSOR)
        width = 16
    elif kind == "clip":
        shutil.copytree(clip_folder, folder)
        width = 12
    else:
        save(tmp_path / "mymodel", vit(pooler=kind == "vit"), VIT_PROCESSOR)
    extractor = folder_extractor(folder)
    features = extractor(IMAGES)
    assert features.shape == (3, width) and extractor.width == width and features.dtype == torch.float32
    assert extractor.distance == "FD-mymodel"
    torch.testing.assert_close(torch.cat([extractor([image]) for image in IMAGES]), features, rtol=1e-4, atol=1e-5)
    if kind == "vit":
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixels = processor([Image.fromarray(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            torch.testing.assert_close(features, vit().eval()(pixels).pooler_output, rtol=1e-5, atol=1e-6)


def test_names_and_hashes_tell_networks_apart(tmp_path: Path) -> None:
    first = folder_extractor(save(tmp_path / "a", vit(), VIT_PROCESSOR))
    model = vit()
    model.layernorm.weight.data[0] += 1
    second = folder_extractor(save(tmp_path / "b", model, VIT_PROCESSOR))
    assert first.weights_hash != second.weights_hash
    assert folder_extractor(str(tmp_path / "a")).weights_hash == first.weights_hash


# Mistakes


def test_what_is_not_a_vision_model_is_one_sentence(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bare: .* image processor cannot be loaded from there \(Can't load image pro"):
        folder_extractor(save(tmp_path / "bare", vit()))
    text = transformers.BertModel(transformers.BertConfig(vocab_size=50, **TINY))
    with pytest.raises(UserError, match=r"text: is no network from images of one size to features"):
        folder_extractor(save(tmp_path / "text", text, CLIP_PROCESSOR))
    with pytest.raises(UserError, match=r"tall: is no network from images of one size to features"):
        folder_extractor(save(tmp_path / "tall", vit(), {**CLIP_PROCESSOR, "do_center_crop": False}))
    with pytest.raises(UserError, match=r"bare: a DINOv2 cannot be loaded from there \(its weights lack \d+ param"):
        dinov2_extractor(str(tmp_path / "bare"))
    model = vit()
    model.layernorm.bias.data[0] = torch.nan
    with pytest.raises(UserError, match=r"layernorm.bias holds NaN"):
        folder_extractor(save(tmp_path / "nan", model, VIT_PROCESSOR))
    broken = tmp_path / "nan" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"nan: .* cannot be loaded from there \(.*header"):
        folder_extractor(str(tmp_path / "nan"))
    silent = tmp_path / "no-tokenizer"
    shutil.copytree(clip_folder, silent, ignore=lambda _, names: [name for name in names if "token" in name])
    with pytest.raises(UserError, match=r"no-tokenizer: .*its tokenizer has \d+ tokens"):
        clip_extractor(str(silent))


def test_missing_weights_are_one_sentence_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^./nowhere: no such folder"):
        folder_extractor("./nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file: is a file; give the folder"):
        clip_extractor(str(tmp_path / "file"))
    for extractor, size in ((clip_extractor, "1.7 GB"), (cmmd_extractor, "1.7 GB"), (dinov2_extractor, "1.2 GB")):
        with pytest.raises(UserError, match=rf"its files \({size}\) are not in the Hub cache .* `hf download "):
            extractor()
