"""The text encoder of a run on token ids: trained along with the U-ViT, or frozen."""

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from uvit.config.train import TrainConfig
from uvit.device import init_device
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.store.types import Features
from uvit.train.checks import check_sizes
from uvit.weights.components import load_text_encoder
from uvit.weights.detect import first_that_has
from uvit.weights.encoders import check_fingerprint, load_tokenizer
from uvit.weights.text_encoder import prepare_to_train


def build_text_encoder(
    config: TrainConfig, features: Features, unet: UViTT2IModel, device: torch.device
) -> tuple[PreTrainedModel, int]:
    """-> (the text encoder to train, the padding token's id): a pretrained one, or a new small CLIP text encoder."""
    tokenizer = load_features_tokenizer(config, features)
    pad_token_id = tokenizer.pad_token_id or 0
    name = first_that_has("text_encoder", config.pretrained_model_name_or_path, config.text_encoder_name_or_path)
    if name is not None:
        encoder = prepare_to_train(load_text_encoder(name), name)
        check_sizes(unet, "text_encoder_name_or_path", name, text_encoder=encoder, tokenizer=tokenizer)
        return encoder, pad_token_id
    width = unet.config.clip_dim
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=config.text_encoder_layers,
        num_attention_heads=next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0),
        max_position_embeddings=unet.config.num_text_tokens,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id,
    )
    with init_device(device):
        return CLIPTextModel(text_config), pad_token_id


def load_frozen_text_encoder(
    config: TrainConfig, features: Features, unet: UViTT2IModel
) -> tuple[PreTrainedModel, int, str]:
    """-> (the text encoder, the padding token's id, its fingerprint), for features without text embeddings."""
    flag = config.text_encoder_name_or_path
    name = first_that_has("text_encoder", config.pretrained_model_name_or_path, flag, features.text_encoder_name)
    if name is None:
        raise UserError(
            f"--feature_path {config.feature_path}: has token ids, no text embeddings, and does not name its text "
            "encoder; name it with --text_encoder_name_or_path, train one with --train_text_encoder, or extract with "
            "--text contexts"
        )
    tokenizer = load_features_tokenizer(config, features)
    encoder = load_text_encoder(name)
    check_sizes(unet, "text_encoder_name_or_path", name, text_encoder=encoder, tokenizer=tokenizer)
    sha256 = check_fingerprint(encoder, features.text_encoder_sha256, "text_encoder_name_or_path", name)
    return encoder, tokenizer.pad_token_id or 0, sha256


def load_features_tokenizer(config: TrainConfig, features: Features) -> Any:
    pretrained = config.pretrained_model_name_or_path
    name = first_that_has("tokenizer", pretrained, config.tokenizer_name, features.tokenizer_name)
    if name is None:
        raise UserError("--tokenizer_name: the features do not name the tokenizer that made their token ids; pass it")
    return load_tokenizer(name)
