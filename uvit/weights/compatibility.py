"""Whether the components of a pipeline fit together: their sizes, and the latent space of the U-ViT and of the VAE."""

from diffusers import AutoencoderKL
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uvit.conventions import LatentSpace
from uvit.model import UViTT2IModel
from uvit.weights.encoders import latent_space_of, num_positions


def check_components(
    unet: UViTT2IModel,
    vqvae: AutoencoderKL | None,
    text_encoder: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raises ValueError if components are of different models. Those that are None are not checked."""
    if LatentSpace.recorded(unet.config).is_pixels:
        if vqvae is not None:
            raise ValueError("the U-ViT works on pixels, without a VAE, but there is one; leave it out")
        if unet.config.in_channels != 3:
            raise ValueError(f"the U-ViT works on pixels, which have 3 channels, but takes {unet.config.in_channels}")
    if vqvae is not None:
        channels, in_channels = vqvae.config.latent_channels, unet.config.in_channels
        if channels != in_channels:
            raise ValueError(f"the VAE's latents have {channels} channels, but the U-ViT takes {in_channels}")
        check_latent_spaces(LatentSpace.recorded(unet.config), latent_space_of(vqvae), in_channels)
    if text_encoder is None:
        return
    if (width := text_encoder.config.hidden_size) != (own := unet.config.clip_dim):
        raise ValueError(f"the text embeddings are {width} wide, but the U-ViT takes {own}")
    positions = num_positions(text_encoder)
    if positions is not None and positions < (own := unet.config.num_text_tokens):
        raise ValueError(f"the text encoder takes {positions} tokens at most, but the U-ViT takes {own}")
    if tokenizer is not None and len(tokenizer) > (size := text_encoder.config.vocab_size):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the text encoder has {size}")


def check_latent_spaces(trained: LatentSpace, own: LatentSpace, channels: int) -> None:
    """Raises ValueError if a U-ViT was trained with another shift than its VAE has.

    Without any shift it may be a U-ViT of an older version, which was trained without the one of its VAE.
    """
    trained.check_channels(channels)
    shifts = [(space.latent_shift, space.latent_std) for space in (trained, own)]
    if shifts[0] not in ((0.0, 1.0), shifts[1]):
        raise ValueError(
            f"the U-ViT was trained with {trained.describe_latents()} of its VAE's latents, but the config of this VAE "
            f"says {own.describe_latents()}"
        )
