"""Feature extractors: from images of any size to the features of a network, each with a name and one preprocessing.

Networks run in float32, frozen. Their weights come from a local folder or file, or from the local Hub cache: nothing is
downloaded. Shapes: B images, D features.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection, Dinov2Model

from uvit.config.evaluate import CLIP_SCORE_MODEL, CMMD_MODEL, DINOV2_MODEL, InceptionInput
from uvit.errors import UserError
from uvit.evaluate.efficientnet_lite import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_SIZE,
    EFFICIENTNET_WIDTH,
    efficientnet_pixels,
    find_efficientnet_weights,
    load_efficientnet,
)
from uvit.evaluate.inception import (
    WEIGHTS_SHA256_PREFIX,
    find_inception_weights,
    inception_input,
    load_inception,
)
from uvit.weights.encoders import fingerprint
from uvit.weights.vision import from_folder_or_cache, load_vision_model, load_whole_model

WEIGHTS_SIZES = {CLIP_SCORE_MODEL: "1.7 GB", CMMD_MODEL: "1.7 GB", DINOV2_MODEL: "1.2 GB"}  # of model.safetensors

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIZE = 224
POSITION_OFFSET = 0.1  # of DINOv2's own code, where it scales the position embeddings


@dataclass(frozen=True)
class Extractor:
    """Images (H, W, 3) uint8 of any sizes -> features (B, D), float32 on the CPU.

        features = extractor(images)

    `preprocess` and `outputs` are its two halves: the first may run in other threads.

    Attributes:
        name: of the network and its input, such as `inception-pytorch-fid`.
        distance: what to call the Frechet distance of its features: `FID` for the published Inception alone.
        width: D.
        weights_hash: SHA-256 of the weights.
        recipe: how images become its input, for people and for `check_same_features`.
        preprocess: an image (H, W, 3) uint8 -> (3, S, S) float32.
        network: (B, 3, S, S) -> `features` (B, D); the Inception also `logits` (B, 1008), without the bias.
        texts: captions -> (B, D), where the network is a CLIP for a CLIP score.
    """

    name: str
    distance: str
    width: int
    weights_hash: str
    recipe: Mapping[str, Any]
    device: torch.device
    preprocess: Callable[[np.ndarray], Tensor]
    network: Callable[[Tensor], dict[str, Tensor]] = field(repr=False)
    texts: Callable[[Sequence[str]], Tensor] | None = field(default=None, repr=False)

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        return self.outputs(torch.stack([self.preprocess(image) for image in images]))["features"]

    def outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """What `network` gives for a batch of preprocessed images, float32 on the CPU."""
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.network(pixels.to(self.device))
        return {name: value.float().cpu() for name, value in found.items()}


# The networks


def inception_extractor(
    weights: str | None = None, convention: InceptionInput = "pytorch-fid", device: str | torch.device = "cpu"
) -> Extractor:
    """FID's Inception v3, with the preprocessing of one of three implementations (see `inception_input`).

    Its distance is called FID if the file is the published one, by its SHA-256, and else FD-inception. Raises UserError
    where the weights are missing or of another network.
    """
    path = find_inception_weights(weights)
    network, sha256 = load_inception(path)
    network.to(device)

    def run(pixels: Tensor) -> dict[str, Tensor]:
        features, logits = network(pixels)
        return {"features": features, "logits": logits}

    return Extractor(
        name=f"inception-{convention}",
        distance="FID" if sha256.startswith(WEIGHTS_SHA256_PREFIX) else "FD-inception",
        width=2048,
        weights_hash=sha256,
        recipe={"input": convention, "size": 299, "layer": "pool3"},
        device=torch.device(device),
        preprocess=functools.partial(inception_input, convention=convention),
        network=run,
    )


def clip_extractor(place: str = CLIP_SCORE_MODEL, device: str | torch.device = "cpu") -> Extractor:
    """A CLIP with both towers, for the CLIP score: projected embeddings of images and, with `texts`, of captions."""

    def load(place: str) -> tuple[Any, Any]:
        model, _ = load_whole_model(CLIPModel, place)
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        if len(tokenizer) != model.config.text_config.vocab_size:  # without files, transformers makes an empty one
            raise ValueError(
                f"its tokenizer has {len(tokenizer)} tokens and its text encoder {model.config.text_config.vocab_size}"
            )
        return model, tokenizer

    model, tokenizer = from_folder_or_cache(load, place, "a CLIP with its tokenizer", WEIGHTS_SIZES.get(place, ""))
    model.to(device)
    size, max_length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def texts(captions: Sequence[str]) -> Tensor:
        ids = tokenizer(list(captions), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            found = model.text_model(**ids.to(device))
            return model.text_projection(found.pooler_output).float().cpu()

    return Extractor(
        name=_name(place),
        distance=f"FD-{_name(place)}",
        width=model.config.projection_dim,
        weights_hash=fingerprint(model),
        recipe={"input": "shorter side bicubic, middle square", "size": size, "layer": "image embedding"},
        device=torch.device(device),
        preprocess=functools.partial(clip_pixels, size=size),
        network=lambda pixels: {"features": model.visual_projection(model.vision_model(pixels).pooler_output)},
        texts=texts,
    )


def cmmd_extractor(place: str = CMMD_MODEL, device: str | torch.device = "cpu") -> Extractor:
    """The image tower of a CLIP, preprocessed as the code of the CMMD paper does."""
    load = functools.partial(load_whole_model, CLIPVisionModelWithProjection)
    model, _ = from_folder_or_cache(load, place, "a CLIP", WEIGHTS_SIZES.get(place, ""))
    model.to(device)
    size = model.config.image_size
    return Extractor(
        name=f"cmmd-{_name(place)}",
        distance=f"FD-{_name(place)}",
        width=model.config.projection_dim,
        weights_hash=fingerprint(model),
        recipe={"input": "middle square, bicubic", "size": size, "layer": "image embedding"},
        device=torch.device(device),
        preprocess=functools.partial(cmmd_pixels, size=size),
        network=lambda pixels: {"features": model(pixels).image_embeds},
    )


def dinov2_extractor(place: str = DINOV2_MODEL, device: str | torch.device = "cpu") -> Extractor:
    """The class token of a DINOv2, preprocessed as dgm-eval does: the whole image, bicubic to 224 x 224."""
    load = functools.partial(load_whole_model, Dinov2Model)
    model, _ = from_folder_or_cache(load, place, "a DINOv2", WEIGHTS_SIZES.get(place, ""))
    weights_hash = fingerprint(model)
    scale_positions(model, DINOV2_SIZE)
    model.to(device)
    return Extractor(
        name=_name(place),
        distance=f"FD-{_name(place)}",
        width=model.config.hidden_size,
        weights_hash=weights_hash,
        recipe={"input": "stretched, bicubic", "size": DINOV2_SIZE, "layer": "class token"},
        device=torch.device(device),
        preprocess=dinov2_pixels,
        network=lambda pixels: {"features": model(pixels).pooler_output},
    )


def efficientnet_extractor(place: str = EFFICIENTNET_LITE0, device: str | torch.device = "cpu") -> Extractor:
    """EfficientNet-Lite0, with the weights of its Python package or of a file. Raises UserError if there are none."""
    network, sha256 = load_efficientnet(find_efficientnet_weights(place))
    network.to(device)
    return Extractor(
        name=EFFICIENTNET_LITE0,
        distance=f"FD-{EFFICIENTNET_LITE0}",
        width=EFFICIENTNET_WIDTH,
        weights_hash=sha256,
        recipe={"input": "stretched, bicubic without antialias", "size": EFFICIENTNET_SIZE, "layer": "mean of the map"},
        device=torch.device(device),
        preprocess=efficientnet_pixels,
        network=lambda pixels: {"features": network(pixels.contiguous(memory_format=torch.channels_last))},
    )


def own_extractor(place: str, device: str | torch.device = "cpu") -> Extractor:
    """What --feature_extractor names: a folder, `efficientnet_lite0` or its weight file, or a Hub id."""
    path = Path(place)
    if path.is_file() or (place == EFFICIENTNET_LITE0 and not path.is_dir()):
        return efficientnet_extractor(place, device)
    return folder_extractor(place, device)


def folder_extractor(place: str, device: str | torch.device = "cpu") -> Extractor:
    """Any vision model of transformers, with the image processor that its folder describes.

    The features are its image embedding or its pooled output, where it has weights for one; else the class token of its
    tokens, or the mean of its map. The distance bears the folder's name. Raises UserError where the folder holds no
    network from images of one size to features.
    """

    model, has_pooler, processor = load_vision_model(place)
    model.to(device)

    def preprocess(image: np.ndarray) -> Tensor:
        return processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0].float()

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": _pooled(model, pixels, has_pooler)}

    try:  # on images of two shapes: the network must see one
        pixels = [preprocess(np.zeros(shape, np.uint8)) for shape in ((64, 48, 3), (48, 64, 3))]
        with torch.inference_mode():
            width = network(torch.stack(pixels).to(device))["features"].flatten(1).shape[1]
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{place}: is no network from images of one size to features ({reason}); give a vision model, such as a "
            "ViT, a DINOv2 or a ConvNeXt"
        ) from None
    return Extractor(
        name=_name(place),
        distance=f"FD-{_name(place)}",
        width=width,
        weights_hash=fingerprint(model),
        recipe={"input": processor.to_dict(), "layer": "pooled"},
        device=torch.device(device),
        preprocess=preprocess,
        network=network,
    )


def _pooled(model: Any, pixels: Tensor, has_pooler: bool) -> Tensor:
    """(B, 3, S, S) -> (B, D)."""
    found = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
    if isinstance(found, Tensor):
        return found
    if has_pooler and getattr(found, "pooler_output", None) is not None:
        return found.pooler_output.flatten(1)
    last = found.last_hidden_state
    return last.mean((2, 3)) if last.ndim == 4 else last[:, 0]


# Preprocessing


def _normalise(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB -> (3, H, W): 0..1, minus the mean, divided by the deviation."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def clip_pixels(image: np.ndarray, size: int = 224) -> Tensor:
    """As CLIP's processor does: the shorter side to `size`, bicubic, then the middle square."""
    picture = Image.fromarray(image)
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return _normalise(picture.crop((left, top, left + size, top + size)), CLIP_MEAN, CLIP_STD)


def cmmd_pixels(image: np.ndarray, size: int = 336) -> Tensor:
    """As the code of the CMMD paper does: the middle square, then bicubic to `size`."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return _normalise(square.resize((size, size), Image.Resampling.BICUBIC), CLIP_MEAN, CLIP_STD)


def dinov2_pixels(image: np.ndarray) -> Tensor:
    """As dgm-eval does: the whole image, stretched to 224 x 224, bicubic."""
    picture = Image.fromarray(image).resize((DINOV2_SIZE, DINOV2_SIZE), Image.Resampling.BICUBIC)
    return _normalise(picture, IMAGENET_MEAN, IMAGENET_STD)


def scale_positions(model: Any, size: int) -> None:
    """Scale a DINOv2's position embeddings to images of `size` as its own code does, which dgm-eval runs.

    That code adds 0.1 to the number of patches before it computes the factor; transformers does not.
    """
    embeddings = model.embeddings.position_embeddings  # (1, 1 + M^2, D)
    old, new = math.isqrt(embeddings.shape[1] - 1), size // model.config.patch_size
    if old == new:
        return
    grid = embeddings[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    factor = (new + POSITION_OFFSET) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    scaled = torch.cat([embeddings[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)
    model.embeddings.position_embeddings = nn.Parameter(scaled, requires_grad=False)


def _name(place: str) -> str:
    """The last part of a folder or Hub id."""
    return Path(place).resolve().name
