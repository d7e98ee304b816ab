"""The text encoder of a run on token ids: trained with the U-ViT, or frozen and encoding them as they come."""

from typing import Any

from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from uvit.config.train import TrainConfig
from uvit.convert.export import check_fingerprint
from uvit.convert.folder import load_text_encoder_of_any
from uvit.convert.place import place_of
from uvit.data.encoders import load_tokenizer
from uvit.data.features import Features
from uvit.errors import UserError
from uvit.model import UViTT2IModel


def build_text_encoder(config: TrainConfig, features: Features, unet: UViTT2IModel) -> tuple[PreTrainedModel, int]:
    """-> (the text encoder to train, the padding token's id): an existing one, or a small CLIP's from scratch."""
    tokenizer = load_features_tokenizer(config, features)
    pad_token_id = tokenizer.pad_token_id or 0
    name = place_of("text_encoder", config.pretrained_model_name_or_path, config.text_encoder_name_or_path)
    if name is not None:
        encoder = load_text_encoder_of_any(name).requires_grad_(True)
        check_sizes(encoder, name, tokenizer, unet)
        return encoder, pad_token_id
    width = unet.config.clip_dim
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=config.text_encoder_layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=unet.config.num_text_tokens,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_token_id,
        )
    ), pad_token_id


def load_frozen_text_encoder(
    config: TrainConfig, features: Features, unet: UViTT2IModel
) -> tuple[PreTrainedModel, int, str]:
    """-> (the text encoder, the padding token's id, its fingerprint), for features that have token ids alone."""
    flag = config.text_encoder_name_or_path
    name = place_of("text_encoder", config.pretrained_model_name_or_path, flag, features.text_encoder_name)
    if name is None:
        raise UserError(
            f"--feature_path {config.feature_path}: has token ids and no contexts, and does not say for which text "
            "encoder; name it with --text_encoder_name_or_path, train one with --train_text_encoder, or extract with "
            "--text contexts"
        )
    tokenizer = load_features_tokenizer(config, features)
    encoder = load_text_encoder_of_any(name)
    check_sizes(encoder, name, tokenizer, unet)
    sha256 = check_fingerprint(encoder, features.text_encoder_sha256, "text_encoder_name_or_path", name)
    return encoder, tokenizer.pad_token_id or 0, sha256


def load_features_tokenizer(config: TrainConfig, features: Features) -> Any:
    pretrained = config.pretrained_model_name_or_path
    name = place_of("tokenizer", pretrained, config.tokenizer_name, features.tokenizer_name)
    if name is None:
        raise UserError("--tokenizer_name: the features do not say which tokenizer made their token ids; name it")
    return load_tokenizer(name)


def check_sizes(encoder: Any, name: str, tokenizer: Any, unet: UViTT2IModel) -> None:
    """The encoder takes the features' token ids, and gives what the U-ViT takes."""
    width, vocab_size = encoder.config.hidden_size, encoder.config.vocab_size
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if width != unet.config.clip_dim:
        raise UserError(
            f"--text_encoder_name_or_path {name}: its width is {width}, the U-ViT's clip_dim "
            f"{unet.config.clip_dim}; choose another --uvit_config_file"
        )
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"--text_encoder_name_or_path {name}: knows {vocab_size} tokens, the features' tokenizer has "
            f"{len(tokenizer)}; name the encoder that belongs to it"
        )
    if positions is not None and positions < unet.config.num_text_tokens:
        raise UserError(
            f"--text_encoder_name_or_path {name}: takes {positions} tokens at most, the U-ViT's num_text_tokens is "
            f"{unet.config.num_text_tokens}; choose another"
        )
