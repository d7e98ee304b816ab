"""Real components at tiny sizes, as folders."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from uvit.data.tokenizer import train_tokenizer

CAPTIONS = [
    "a red circle on a blue background",
    "a small green square",
    "two cats sit on a table",
    "一个红色的圆",
]


def tiny_vae_folder(path: Path, factor: int = 4, scaling_factor: float = 0.5) -> Path:
    """An AutoencoderKL with random weights that scales images down by `factor`, a power of two."""
    levels = factor.bit_length()
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
    )
    vae.save_pretrained(path)
    return path


def tiny_text_encoder_folder(path: Path, num_tokens: int = 16, width: int = 32) -> Path:
    """A CLIPTextModel with random weights, and a tokenizer in the same folder."""
    tokenizer = train_tokenizer(CAPTIONS * 2, 320, num_tokens)
    torch.manual_seed(0)
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
