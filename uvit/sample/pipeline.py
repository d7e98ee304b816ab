"""The text-to-image pipeline, in diffusers' manner."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uvit.data.encoders import decode_latents, downsampling_of, encode_tokens, tokenize
from uvit.diffusion import LATENT_SCALE
from uvit.images import to_pil
from uvit.model import UViTT2IModel
from uvit.sample.denoise import denoise

Generators = torch.Generator | list[torch.Generator]
StepCallback = Callable[["UViTPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class UViTPipeline(DiffusionPipeline):
    """Images from prompts with a U-ViT.

    The folder is laid out as published ones are: `unet/` holds the U-ViT and `vqvae/` the VAE. Two values of
    the model stand in model_index.json: `latent_scale`, the factor of its latents in training, and
    `prediction_type`, what the network predicts, whatever the scheduler asks for.
    """

    vqvae: Any  # set by register_modules
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    config: Any
    model_cpu_offload_seq = "text_encoder->unet->vqvae"

    def __init__(
        self,
        vqvae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UViTT2IModel,
        scheduler: SchedulerMixin,
        latent_scale: float = LATENT_SCALE,
        prediction_type: str = "epsilon",
    ):
        super().__init__()
        self.register_modules(
            vqvae=vqvae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
        )
        self.register_to_config(latent_scale=latent_scale, prediction_type=prediction_type)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "UViTPipeline":
        """As in diffusers, from safetensors only."""
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    def encode_prompt(self, prompt: str | list[str]) -> Tensor:
        """Context (B, T, D) of the prompts; warns of what is cut off one that is too long."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        num_tokens = self.unet.config.num_text_tokens
        for text in prompts:
            cut = self.tokenizer(text, verbose=False).input_ids[num_tokens - 1 :]
            if len(cut) > 1:  # more than the closing token
                rest = self.tokenizer.decode(cut, skip_special_tokens=True)
                warnings.warn(f"the model reads {num_tokens} tokens; cut off: {rest!r} of {text!r}", stacklevel=3)
        token_ids = tokenize(self.tokenizer, prompts, num_tokens).to(self._execution_device)
        return encode_tokens(self.text_encoder, token_ids, self.tokenizer.pad_token_id)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            prompt: one or more; or their context in `prompt_embeds` (B, T, D), and the negative ones' in
                `negative_prompt_embeds`.
            height, width: in pixels; by default what the model was trained for, at most that.
            guidance_scale: 1 switches guidance off; `negative_prompt` then plays no part.
            negative_prompt: one for all or one for each prompt, instead of the empty one.
            num_images_per_prompt: N; the N images of a prompt follow one another.
            generator: draws the noise; a list holds one for each image.
            latents: (B N, C, h, w), the standard normal noise to begin with.
            output_type: 'pil'; 'np' (B N, H, W, 3) or 'pt' (B N, 3, H, W) in [0, 1]; 'latent' (B N, C, h, w).
            callback_on_step_end: (pipeline, step, timestep, {"latents": ...}) -> the same or other latents.

        Raises ValueError for arguments that do not fit together.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of 'pil', 'np', 'pt', 'latent'")
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        context = negative = self._context(prompt, prompt_embeds)
        if guidance_scale != 1:
            negative = self._context(negative_prompt, negative_prompt_embeds)
        if len(negative) not in (1, len(context)):
            raise ValueError(f"there are {len(negative)} negative prompts for {len(context)} prompts")
        negative = negative.expand_as(context).repeat_interleave(num_images_per_prompt, dim=0)
        context = context.repeat_interleave(num_images_per_prompt, dim=0)

        def on_step(i: int, t: Tensor, latents: Tensor) -> Tensor:
            return (
                callback_on_step_end(self, i, t, {"latents": latents})["latents"] if callback_on_step_end else latents
            )

        latents = denoise(
            self.unet,
            self.scheduler,
            self._noise(self._latents_shape(len(context), height, width), generator, latents),
            context,
            negative,
            guidance_scale,
            num_inference_steps,
            self.config.prediction_type,
            generator=generator,
            progress=self.progress_bar,
            on_step=on_step,
        )
        images: Any = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _context(self, prompt: str | list[str] | None, embeds: Tensor | None) -> Tensor:
        """(B, T, D), as the network takes it."""
        if embeds is None:
            if prompt is None:
                raise ValueError("prompt and prompt_embeds are both missing")
            embeds = self.encode_prompt(prompt)
        elif prompt is not None:
            raise ValueError("prompt and prompt_embeds are both given")
        return embeds.to(self._execution_device, self.unet.dtype)

    def _latents_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        factor, size = downsampling_of(self.vqvae), self.unet.config.sample_size
        full = (size, size) if isinstance(size, int) else size
        pixels = [given or factor * side for given, side in zip((height, width), full, strict=True)]
        if any(side % factor for side in pixels):
            raise ValueError(f"height {pixels[0]} and width {pixels[1]} must be multiples of {factor}")
        return batch, self.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor

    def _noise(self, shape: tuple[int, ...], generator: Generators | None, latents: Tensor | None) -> Tensor:
        """Drawn in float32, whatever the model's dtype: a seed is a picture."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"there are {len(generator)} generators for {shape[0]} images")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {shape} is needed")
        return latents.to(self._execution_device)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        images = decode_latents(self.vqvae, latents.to(self.vqvae.dtype), self.config.latent_scale).float()
        if output_type == "pil":
            return to_pil(images)
        images = (images + 1) / 2
        return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images


LDMTextToImageUViTPipeline = UViTPipeline  # the name in published folders
