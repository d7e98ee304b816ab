"""Tiny networks of the real classes, with random weights."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.tiny import CAPTIONS
from uvit.extract.tokenizer import train_tokenizer
from uvit.io import write_json

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}


def tiny_clip_folder(path: Path) -> Path:
    """A CLIP with its tokenizer and image processor: 16 tokens, images of 32 pixels, embeddings of 12."""
    tokenizer = train_tokenizer(CAPTIONS * 2, 320, 16)
    torch.manual_seed(0)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_dim": 12, **tokens}
    vision = {**TINY, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(path)
    write_json(path / "preprocessor_config.json", CLIP_PROCESSOR)
    tokenizer.save_pretrained(path)
    return path
