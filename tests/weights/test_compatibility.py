"""Components that do not fit together are named. `tests/test_components_fit.py` has every command."""

import pytest
from diffusers import AutoencoderKL
from transformers import RobertaConfig, RobertaModel

from uvit.model import UViTT2IModel
from uvit.weights.compatibility import check_components

VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
UNET = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 8, "clip_dim": 32, "num_text_tokens": 16}  # fmt: skip


def test_components_that_are_absent_are_not_checked() -> None:
    check_components(UViTT2IModel(**UNET), None, None, None)


def test_a_vae_with_another_shift() -> None:
    unet = UViTT2IModel(**UNET)
    unet.register_to_config(latent_scale=0.5, latent_shift=0.1)
    check_components(unet, AutoencoderKL(**VAE, scaling_factor=0.5, shift_factor=0.1), None, None)
    with pytest.raises(ValueError, match=r"trained with latent scale 0.5, shift 0.1 of its VAE's latents, .* 0.2$"):
        check_components(unet, AutoencoderKL(**VAE, scaling_factor=0.5, shift_factor=0.2), None, None)


def test_positions_that_a_text_encoder_does_not_use_do_not_count() -> None:
    """RoBERTa counts from after the padding token's id: of 17 positions, 15 are for tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    check_components(UViTT2IModel(**UNET), None, RobertaModel(RobertaConfig(**sizes, max_position_embeddings=18)), None)
    with pytest.raises(ValueError, match="takes 15 tokens at most, but the U-ViT takes 16"):
        check_components(
            UViTT2IModel(**UNET), None, RobertaModel(RobertaConfig(**sizes, max_position_embeddings=17)), None
        )
