"""`UViTPipeline`: text to image, image to image and inpainting, as a diffusers pipeline."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uvit.conventions import (
    TIMESTEP_OFFSETS,
    Conventions,
    PerChannel,
    record_conventions,
    recorded_conventions,
)
from uvit.errors import UserError
from uvit.images import to_pil
from uvit.model import UViTT2IModel
from uvit.sample.arguments import (
    as_prompts,
    check_embeds,
    check_generators,
    check_images,
    check_noise,
    check_number,
    check_settings,
    check_whole,
    refuse_unsupported,
)  # fmt: skip
from uvit.sample.callbacks import CALLBACK_TENSORS, Steps, callback_inputs
from uvit.sample.denoise import ALL_TIMESTEPS, denoise
from uvit.sample.edit import STRENGTH, Original, first_step, read_original
from uvit.sample.schedulers import scheduler_from_config
from uvit.weights.compatibility import check_components
from uvit.weights.components import pipeline_components
from uvit.weights.encoders import decode_latents, downsampling_of, encode_tokens, latent_space_of, tokenize

Generators = torch.Generator | list[torch.Generator]
_CONVENTIONS = tuple(asdict(Conventions()))
_INDEXED = ("latent_scale", "prediction_type", "timestep_labels")  # in a model_index.json, a list is a component
StepCallback = Callable[["UViTPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]


class UViTPipeline(DiffusionPipeline):
    """Generates images from prompts with a U-ViT.

    The folder has the layout of published ones: `unet/` holds the U-ViT and `vqvae/` the VAE. A U-ViT on pixels
    (`latents` of its config) has no VAE: `vqvae` is None, and its latents are the images in [-1, 1].

    How the U-ViT is to be sampled (`Conventions` of `uvit.conventions`: the latent space, what is predicted, and the
    timesteps) is in its own config. The arguments here are for a U-ViT whose config lacks them, and are recorded in it.
    Without both, the latents are those of the VAE's config. The model_index.json repeats three, for older versions.
    """

    vqvae: Any  # set by register_modules; None for a model on pixels
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    model_cpu_offload_seq = "text_encoder->unet->vqvae"
    _optional_components = ["vqvae"]  # noqa: RUF012 - diffusers' name
    _callback_tensor_inputs = CALLBACK_TENSORS  # diffusers' name
    _interrupt = False
    _guidance_scale = 1.0
    _num_timesteps = 0

    def __init__(
        self,
        vqvae: AutoencoderKL | None,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UViTT2IModel,
        scheduler: SchedulerMixin,
        latent_scale: float | None = None,
        prediction_type: str | None = None,
        timestep_labels: str | None = None,
        latent_shift: PerChannel | None = None,
        latent_std: PerChannel | None = None,
        path: str | None = None,
        latents: str | None = None,
    ):
        super().__init__()
        given: dict[str, Any] = {"latent_scale": latent_scale, "latent_shift": latent_shift, "latent_std": latent_std}
        given |= {"timestep_labels": timestep_labels, "prediction_type": prediction_type}
        given |= {"path": path, "latents": latents}
        record_conventions(unet, given)
        check_components(unet, vqvae, text_encoder, tokenizer)
        self.register_modules(
            vqvae=vqvae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
        )

    @property
    def conventions(self) -> Conventions:
        """How the U-ViT is to be sampled: what its config says, and for latents that it does not know, the VAE's."""
        space = {} if self.vqvae is None else asdict(latent_space_of(self.vqvae))
        return Conventions.recorded(space | recorded_conventions(self.unet.config))

    @property
    def config(self) -> Any:
        """The config of diffusers, and the conventions."""
        is_built = {"unet", "vqvae"} <= set(self.__dict__)
        conventions = asdict(self.conventions) if is_built else {}
        return FrozenDict({**self._internal_dict, **conventions})

    def register_to_config(self, **settings: Any) -> None:
        """As in diffusers, except that conventions go to the config of the U-ViT."""
        own = {key: value for key, value in settings.items() if key in _CONVENTIONS}
        if own:
            self.unet.register_to_config(**own)
        super().register_to_config(**{key: value for key, value in settings.items() if key not in _CONVENTIONS})

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the conventions in the U-ViT's config, and those of _INDEXED in model_index.json."""
        conventions = asdict(self.conventions)
        self.register_to_config(**conventions)
        super().register_to_config(**{key: conventions[key] for key in _INDEXED})
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "UViTPipeline":
        """As in diffusers. A U-ViT that is passed keeps its conventions."""
        return super().from_pipe(pipeline, **{**passed_conventions(kwargs), **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "UViTPipeline":
        """As in diffusers, from safetensors only. Also opens PaddleMIX's folders and files, converted in memory."""
        if (arguments := pipeline_components(pretrained_model_name_or_path, kwargs)) is not None:
            if (config := arguments.pop("scheduler_config", None)) is not None:
                arguments["scheduler"] = scheduler_from_config(config)
            arguments |= passed_conventions(kwargs)
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            return cls(**arguments) if dtype is None else cls(**arguments).to(dtype)
        options = {**passed_conventions(kwargs), **kwargs, "use_safetensors": True}
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time. Saves memory. Like the next three, raises ValueError without a VAE."""
        self._vae("enable_vae_slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._vae("disable_vae_slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode images larger than the VAE's training size in tiles. Saves memory."""
        self._vae("enable_vae_tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        self._vae("disable_vae_tiling").disable_tiling()

    def _vae(self, caller: str) -> AutoencoderKL:
        if self.vqvae is None:
            raise UserError(f"{caller}: this pipeline has no VAE; leave it out")
        return self.vqvae

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """Raises ValueError: attention is computed without its matrix of weights, so there is nothing to slice."""
        if slice_size is None:  # disable_attention_slicing
            return
        raise ValueError("enable_attention_slicing: attention needs little memory here; try enable_vae_slicing")

    # As in diffusers, for callbacks: setting `_interrupt` or `_guidance_scale` takes effect at the next step.

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def encode_prompt(self, prompt: str | list[str]) -> Tensor:
        """The text embeddings (B, T, D) of the prompts. Warns if a prompt is too long and is truncated."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        num_tokens = self.unet.config.num_text_tokens
        for text in dict.fromkeys(prompts):
            cut = self.tokenizer(text, verbose=False).input_ids[num_tokens - 1 :]
            if len(cut) > 1:  # more than the end token
                removed = truncate(self.tokenizer.decode(cut, skip_special_tokens=True))
                warnings.warn(
                    f"the model reads {num_tokens} tokens; cut off: {removed!r} of {truncate(text)!r}", stacklevel=3
                )
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
        guidance_interval: tuple[float, float] = ALL_TIMESTEPS,
        negative_prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        eta: float = 0.0,
        **unsupported: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: one or more. Instead, `prompt_embeds` and `negative_prompt_embeds` take text embeddings (B, T, D).
            height, width: in pixels, at most the size that the model was trained for, which is the default.
            guidance_scale: 1 turns guidance off; `negative_prompt` is then unused.
            guidance_interval: lowest and highest timestep with guidance, in 1..1000.
            negative_prompt: one for all or one per prompt, instead of the empty prompt.
            image: the image to begin with, one for all or one per prompt: PIL, or as 'np' or 'pt' below.
            mask_image: the same in black and white. White is repainted; the rest keeps its exact pixels.
            strength: how much of the image may change: the fraction of the steps that are run, above 0 to 1. At 1
                sampling begins with pure noise. Default: 0.8; 1 with a mask.
            num_images_per_prompt: N. The N images of a prompt are consecutive.
            generator: of the noise; a list holds one per image.
            latents: (B N, C, h, w), the standard normal noise to begin with.
            output_type: 'pil'; 'np' (B N, H, W, 3) or 'pt' (B N, 3, H, W) in [0, 1]; 'latent' (B N, C, h, w).
            callback_on_step_end: (pipeline, step, timestep, {"latents": ...}) -> None, or a dict with other tensors in
                place of these; or a PipelineCallback of diffusers. It may set `pipeline._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: which it gets: latents, negative_prompt_embeds, and prompt_embeds,
                which with guidance has the negative ones first (2 B N, T, D).
            eta: how much noise DDIM adds, from 0 to 1; other schedulers have none.
            unsupported: other arguments of StableDiffusionPipeline; an error says why each is not available.

        Raises ValueError if arguments do not fit together, and if an image is NaN or infinite.
        """
        conventions = self.conventions
        check_components(self.unet, self.vqvae, self.text_encoder, self.tokenizer)  # any may have been replaced
        if self.vqvae is None and not conventions.is_pixels:
            raise ValueError("the U-ViT works on a VAE's latents, but the pipeline has no VAE (vqvae); pass it")
        refuse_unsupported(unsupported, self.__call__)
        check_settings(num_inference_steps, num_images_per_prompt, guidance_scale, guidance_interval, eta, output_type)
        inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        if isinstance(generator, tuple):
            generator = list(generator)
        context = negative = self._context("prompt", prompt, prompt_embeds)
        if guidance_scale != 1:
            negative = self._context("negative_prompt", negative_prompt, negative_prompt_embeds)
        if len(negative) not in (1, len(context)):
            raise ValueError(f"there are {len(negative)} negative prompts for {len(context)} prompts")
        negative = negative.expand_as(context).repeat_interleave(num_images_per_prompt, dim=0)
        context = context.repeat_interleave(num_images_per_prompt, dim=0)

        shape = self._latents_shape(len(context), height, width)
        noise = self._noise(shape, generator, latents)
        original = self._original(image, mask_image, shape)
        start = 0
        if original is not None:
            if strength is None:
                strength = STRENGTH if mask_image is None else 1.0
            check_number("strength", strength)
            start = first_step(strength, num_inference_steps, self.scheduler.order)
        elif strength is not None:
            raise ValueError(f"strength {strength} needs an image")

        def keep(i: int, latents: Tensor) -> Tensor:
            return (
                latents if original is None else original.keep(self.scheduler, i + 1, latents, noise, conventions.path)
            )

        self._interrupt, self._guidance_scale = False, guidance_scale
        steps = Steps(self, negative, context, start, callback_on_step_end, inputs, keep)
        latents = denoise(
            self.unet,
            self.scheduler,
            noise,
            context,
            negative,
            guidance_scale,
            num_inference_steps,
            conventions.prediction_type,
            generator=generator,
            progress=self.progress_bar,
            on_step=steps.after,
            timestep_offset=TIMESTEP_OFFSETS[conventions.timestep_labels],
            start=start,
            image=None if original is None else original.latents,
            guidance_interval=guidance_interval,
            eta=eta,
            control=steps.before,
            path=conventions.path,
        )
        check_images(latents, prompt)
        images: Any = latents if output_type == "latent" else self._decode(latents, original, output_type, prompt)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _context(self, name: str, prompt: Any, embeds: Tensor | None) -> Tensor:
        """The text embeddings (B, T, D), on the device and in the dtype of the network."""
        if embeds is None:
            if prompt is None or not (prompts := as_prompts(name, prompt)):
                raise ValueError(f"{name} and {name}_embeds are both missing")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(f"{name}: the pipeline has no text encoder and tokenizer; pass {name}_embeds")
            embeds = self.encode_prompt(prompts)
        elif prompt is not None:
            raise ValueError(f"{name} and {name}_embeds are both given")
        else:
            check_embeds(f"{name}_embeds", embeds, self.unet.config.num_text_tokens, self.unet.config.clip_dim)
        return embeds.to(self._execution_device, self.unet.dtype)

    @property
    def resolution(self) -> tuple[int, int]:
        """(H, W) that the model was trained for."""
        factor, size = downsampling_of(self.vqvae), self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return factor * height, factor * width

    def _latents_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        factor = downsampling_of(self.vqvae)
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                check_whole(name, side)
        pixels = [wanted or side for wanted, side in zip((height, width), self.resolution, strict=True)]
        if any(side % factor for side in pixels):
            raise ValueError(f"height {pixels[0]} and width {pixels[1]} must be multiples of {factor}")
        return batch, self.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor

    def _noise(self, shape: tuple[int, ...], generator: Generators | None, latents: Tensor | None) -> Tensor:
        """The initial noise, always in float32, so that a seed gives the same image in every dtype."""
        check_generators(generator, shape[0])
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        check_noise(latents, shape)
        return latents.to(self._execution_device)

    def _original(self, image: Any, mask_image: Any, shape: tuple[int, int, int, int]) -> Original | None:
        if image is None:
            if mask_image is not None:
                raise ValueError("mask_image needs an image")
            return None
        factor = downsampling_of(self.vqvae)
        size = shape[2] * factor, shape[3] * factor
        return read_original(self.vqvae, self.conventions, image, mask_image, size, shape[0], self._execution_device)

    def _decode(self, latents: Tensor, original: Original | None, output_type: str, prompt: Any) -> Any:
        dtype = latents.dtype if self.vqvae is None else self.vqvae.dtype
        images = decode_latents(self.vqvae, latents.to(dtype), self.conventions).float()
        check_images(images, prompt)
        if original is not None:
            images = original.paste(images)
        if output_type == "pil":
            return to_pil(images)
        images = (images + 1) / 2
        return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images


def passed_conventions(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The conventions of a U-ViT that is passed in place of a pipeline's own."""
    return recorded_conventions(arguments["unet"].config) if arguments.get("unet") is not None else {}


def truncate(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


LDMTextToImageUViTPipeline = UViTPipeline  # the name in published folders
