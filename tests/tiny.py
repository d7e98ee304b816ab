"""Real components at tiny sizes, as folders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTImageProcessorPil, ViTModel

from uvit.checkpoint.saver import Saver
from uvit.checkpoint.tensors import Groups
from uvit.conventions import LatentSpace
from uvit.extract.tokenizer import train_tokenizer
from uvit.store.types import FeatureBatch

CAPTIONS = [
    "a red circle on a blue background",
    "a small green square",
    "two cats sit on a table",
    "一个红色的圆",
]


def tiny_vae_folder(path: Path, factor: int = 4, scaling_factor: float = 0.5, seed: int = 0, **settings: Any) -> Path:
    """An AutoencoderKL with random weights that scales images down by `factor`, a power of two; more of its config."""
    levels = factor.bit_length()
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        scaling_factor=scaling_factor,
        **{"latent_channels": 4, "norm_num_groups": 4, "sample_size": 32, "mid_block_add_attention": False, **settings},
    )
    vae.save_pretrained(path)
    return path


def tiny_text_encoder_folder(path: Path, num_tokens: int = 16, width: int = 32, seed: int = 0) -> Path:
    """A CLIPTextModel with random weights, and a tokenizer in the same folder."""
    tokenizer = train_tokenizer(CAPTIONS * 2, 320, num_tokens)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=num_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_vit_folder(path: Path) -> Path:
    """A vision model with random weights, 32 features, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


class ArrayFeatures:
    """Features held in arrays: row r's moments are all r, the mirrored ones all -r, its context k is all r + k / 10."""

    def __init__(self, num_samples: int, num_tokens: int, width: int, size: int, flipped: bool = False):
        rows = np.arange(num_samples, dtype=np.float32)
        self.num_samples = num_samples
        self.moments_shape, self.latents_shape, self.is_pixels = (8, size, size), (4, size, size), False
        self.context_shape = (num_tokens, width)
        self.num_tokens = num_tokens
        self.latent_space = LatentSpace(0.5)
        self.resolution = None
        self.flipped = flipped
        self.empty_context = np.full((num_tokens, width), -1, dtype=np.float32)
        self.empty_token_ids = np.zeros(num_tokens, dtype=np.int64)
        self.vae_name = self.text_encoder_name = self.tokenizer_name = None
        self.vae_sha256 = self.text_encoder_sha256 = None
        self.moments = np.broadcast_to(rows[:, None, None, None], (num_samples, *self.moments_shape))

    def read(self, rows: np.ndarray, caption_draws: np.ndarray, flip_draws: np.ndarray | None = None) -> FeatureBatch:
        which = np.floor(caption_draws * 3)
        values = (rows + which / 10).astype(np.float32)
        context = np.broadcast_to(values[:, None, None], (len(rows), *self.context_shape)).copy()
        token_ids = np.broadcast_to((1 + rows % 7)[:, None], (len(rows), self.num_tokens)).copy()
        moments = self.moments[rows].copy()
        if flip_draws is not None:
            moments[flip_draws < 0.5] *= -1
        return FeatureBatch(moments, context, token_ids)

    def captions(self, row: int) -> tuple[str, ...]:
        return tuple(f"caption {k} of {row}" for k in range(3))


def array_features(
    num_samples: int = 20, num_tokens: int = 3, width: int = 8, size: int = 4, flipped: bool = False
) -> ArrayFeatures:
    return ArrayFeatures(num_samples, num_tokens, width, size, flipped)


def save_checkpoint(output_dir: Path, step: int, tensors: Groups, record: dict[str, Any]) -> Path:
    """Write `checkpoint-{step}` here and now."""
    with Saver(output_dir) as saver:
        saver.save(step, tensors, record)
    return output_dir / f"checkpoint-{step}"
