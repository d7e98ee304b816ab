"""Write a model in the formats of the official U-ViT code and of PaddleMIX.

The weights are written bit for bit. What a format cannot hold is an error, or a `dropped:` line of the report.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from uvit.config.model import KINDS
from uvit.conventions import Conventions, LatentSpace
from uvit.diffusion import alphas_cumprod, scheduler_config
from uvit.errors import UserError
from uvit.io import write_json
from uvit.weights import text_encoder as text
from uvit.weights import unet as uvit
from uvit.weights import vae
from uvit.weights.components import CONVENTIONS, PADDLEMIX, TRAINED, Components
from uvit.weights.detect import CONFIG, FLAGS, INDEX, Network
from uvit.weights.pdparams import write_pdparams

ExportContainer = Literal["safetensors", "pdparams"]
PPDIFFUSERS_VERSION = "0.29.0"  # whose folders are written
UNET_FILE = {"safetensors": "diffusion_paddle_model.safetensors", "pdparams": "model_state.pdparams"}
TEXT_FILE = {"safetensors": "model.safetensors", "pdparams": "model_state.pdparams"}

# The keys of PaddleMIX's configs; it does not know newer ones of diffusers and transformers.
_UVIT_EXTRA = {
    "attn_drop_rate": 0.0,
    "drop_rate": 0.0,
    "norm_type": "layer_norm",
    "out_channels": None,
    "pos_drop_rate": 0.0,
    "qk_scale": None,
}
_UVIT_KEYS = [key for key in KINDS if key != "bottleneck_dim"]
_VAE_KEYS = [
    "act_fn", "block_out_channels", "down_block_types", "force_upcast", "in_channels", "latent_channels",
    "latents_mean", "latents_std", "layers_per_block", "norm_num_groups", "out_channels", "sample_size",
    "scaling_factor", "shift_factor", "up_block_types", "use_post_quant_conv", "use_quant_conv",
]  # fmt: skip
_TEXT_KEYS = [
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_factor",
    "initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "model_type",
    "num_attention_heads", "num_hidden_layers", "pad_token_id", "projection_dim", "vocab_size",
]  # fmt: skip
_DDIM_KEYS = [
    "beta_end", "beta_schedule", "beta_start", "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio",
    "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr", "sample_max_value", "set_alpha_to_one",
    "steps_offset", "thresholding", "timestep_spacing", "trained_betas",
]  # fmt: skip


# The official U-ViT code


def write_official(components: Components, folder: Path, is_ema: bool = True) -> None:
    """Write nnet_ema.pth, nnet.pth and autoencoder_kl.pth, as far as the source has them, and their configs for `uvit`.

    is_ema: whether `unet` has the EMA weights.
    """
    config = components.unet.config
    sides = {config["sample_size"]} if isinstance(config["sample_size"], int) else {*config["sample_size"]}
    if len(sides) > 1:
        raise UserError(
            f"--to official: its U-ViT needs square latents, and the sample_size of this one is {config['sample_size']}"
        )
    save_pth(components.unet.state_dict(), folder / ("nnet_ema.pth" if is_ema else "nnet.pth"))
    if components.raw_unet is not None:
        save_pth(components.raw_unet, folder / "nnet.pth")
    if components.vqvae is not None:
        weights = vae.to_ldm(components.vqvae.state_dict(), len(components.vqvae.config["block_out_channels"]))
        save_pth(weights, folder / "autoencoder_kl.pth")
    components.report.converted.append(
        f"for the official U-ViT code: UViT(img_size={next(iter(sides))}, patch_size={config['patch_size']}, "
        f"in_chans={config['in_channels']}, embed_dim={config['num_attention_heads'] * config['attention_head_dim']}, "
        f"depth={config['num_layers']}, num_heads={config['num_attention_heads']}, mlp_ratio={config['mlp_ratio']}, "
        f"qkv_bias={config['qkv_bias']}, clip_dim={config['clip_dim']}, num_clip_token={config['num_text_tokens']}, "
        f"conv={config['conv']})"
    )
    _write_configs(components, folder, ("unet", "vqvae"), "the official U-ViT code")
    _report_lost_conventions(components, TRAINED, "the official U-ViT code")


def save_pth(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises OSError where the disk is full or fails."""
    with path.open("wb") as file:
        sink: Any = _Sink(file)
        torch.save({name: value.detach().clone().contiguous() for name, value in tensors.items()}, sink)
        if sink.error is not None:
            raise sink.error


class _Sink:
    """A file for torch.save, which may end the process if a write fails; `error` keeps the failure instead."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None: ...


# PaddleMIX


def write_paddle(components: Components, folder: Path, container: ExportContainer) -> None:
    """Write the U-ViT alone: its weights in Paddle's layout, and its config.json."""
    _write_unet(components, folder, container)
    write_json(folder / CONVENTIONS, asdict(components.conventions))
    _report_lost_conventions(components, PADDLEMIX, "the PaddleMIX pipeline")


def _write_unet(components: Components, folder: Path, container: ExportContainer) -> None:
    weights = uvit.transpose_unet(components.unet.state_dict())
    _write_arrays(weights, folder / UNET_FILE[container], "pd")
    write_json(
        folder / CONFIG,
        {
            **_ppdiffusers_class("UViTT2IModel"),
            **_UVIT_EXTRA,
            **{key: components.unet.config[key] for key in _UVIT_KEYS},
        },
    )


def write_paddlemix(components: Components, folder: Path, container: ExportContainer) -> None:
    """Write a pipeline folder. Raises UserError where PaddleMIX does not support the encoder, tokenizer or VAE."""
    check_encoders(components, "port")
    for name in ("unet", "vqvae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
    _write_unet(components, folder / "unet", container)
    autoencoder, encoder = components.vqvae, components.text_encoder
    _write_arrays(vae.transpose_vae(autoencoder.state_dict()), folder / "vqvae" / UNET_FILE[container], "pd")
    config = {key: autoencoder.config[key] for key in _VAE_KEYS if key in autoencoder.config}
    write_json(folder / "vqvae" / CONFIG, _ppdiffusers_class("AutoencoderKL") | config)
    weights = {text.PREFIX + name: value for name, value in text.transpose_text_encoder(encoder.state_dict()).items()}
    _write_arrays(weights, folder / "text_encoder" / TEXT_FILE[container], "np")
    settings = encoder.config.to_dict()
    config = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    write_json(folder / "text_encoder" / CONFIG, {"architectures": ["CLIPTextModel"], **config})
    _write_tokenizer(components.tokenizer, folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", paddlemix_scheduler(components))
    libraries = {"scheduler": "ppdiffusers", "text_encoder": "ppdiffusers.transformers"}
    libraries |= {"tokenizer": "ppdiffusers.transformers", "unet": "ppdiffusers", "vqvae": "ppdiffusers"}
    classes = {"scheduler": "DDIMScheduler", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    classes |= {"unet": "UViTT2IModel", "vqvae": "AutoencoderKL"}
    index = {name: [library, classes[name]] for name, library in libraries.items()}
    write_json(folder / INDEX, _ppdiffusers_class("LDMTextToImageUViTPipeline") | index)
    write_json(folder / CONVENTIONS, asdict(components.conventions))
    _report_lost_conventions(components, PADDLEMIX, "the PaddleMIX pipeline", stores_prediction_type=True)


def write_trainer(components: Components, folder: Path) -> None:
    """Write model_state.pdparams, from which the PaddleMIX trainer resumes. Its LayerNorms have no weight and bias."""
    weights = uvit.transpose_unet(components.unet.state_dict())
    for name, value in (weights | (components.raw_unet or {})).items():
        if uvit.is_norm(name) and not torch.equal(value, torch.full_like(value, name.endswith("weight"))):
            raise UserError(
                f"--to trainer: the PaddleMIX trainer has no {name}, and that of this model is not all "
                f"{int(name.endswith('weight'))}; use --to port"
            )
    ema = {name: value for name, value in weights.items() if not uvit.is_norm(name)}
    raw = ema
    if components.raw_unet is not None:
        raw = {n: v for n, v in uvit.transpose_unet(components.raw_unet).items() if not uvit.is_norm(n)}
    else:
        components.report.defaulted.append("unet.* and model_ema.* are equal, as the source has one set of weights")
    content = {"alphas_cumprod": alphas_cumprod()[1:].float()}
    if components.text_encoder is not None:
        check_encoders(components, "trainer", needs_all=False)
        linear = text.transpose_text_encoder(components.text_encoder.state_dict())
        content |= {f"text_encoder.{text.paddlenlp_name(name)}": value for name, value in linear.items()}
    if components.vqvae is not None:
        linear = vae.transpose_vae(components.vqvae.state_dict())
        content |= {f"vae.{name}": value for name, value in linear.items()}
    content |= {f"unet.{name}": value for name, value in raw.items()}
    content |= {f"model_ema.{name.replace('.', '')}": value for name, value in ema.items()}
    write_pdparams(folder / "model_state.pdparams", content)
    _write_configs(components, folder, ("unet", "vqvae", "text_encoder"), "the PaddleMIX trainer")
    _report_lost_conventions(components, TRAINED, "the PaddleMIX trainer")


def check_unet(components: Components, to: str) -> None:
    """Raises UserError where the U-ViT has a part that those of the official code and of PaddleMIX have not."""
    if (bottleneck := components.unet.config["bottleneck_dim"]) is not None:
        raise UserError(
            f"--to {to}: its U-ViT has no bottleneck in the patch embedding, and this one has bottleneck_dim "
            f"{bottleneck}; use --to pipeline or --to diffusers"
        )


def check_encoders(components: Components, to: str, needs_all: bool = True) -> None:
    """Raises UserError where an encoder is missing, or PaddleMIX does not support it."""
    if needs_all and components.conventions.is_pixels:
        raise UserError(
            f"--to {to}: PaddleMIX's pipeline decodes with a VAE, and this model works on pixels; --to paddle writes "
            "the U-ViT alone"
        )
    missing = [name for name in FLAGS if getattr(components, name) is None]
    if missing and needs_all:
        flags = ", ".join(f"--{FLAGS[name]}" for name in missing)
        raise UserError(
            f"--to {to}: needs a complete pipeline, and the source has no {', '.join(missing)}; pass {flags}"
        )
    if not isinstance(components.text_encoder, CLIPTextModel):
        raise UserError(
            f"--to {to}: PaddleMIX supports only CLIP's text encoder, and this is a "
            f"{type(components.text_encoder).__name__}; --to paddle writes the U-ViT alone"
        )
    if components.vqvae is not None and not components.vqvae.config.get("mid_block_add_attention", True):
        raise UserError(f"--to {to}: PaddleMIX's VAE has attention in its mid block, and this one has none")
    model = getattr(getattr(components.tokenizer, "backend_tokenizer", None), "model", None)
    if needs_all and getattr(model, "end_of_word_suffix", None) != "</w>":
        raise UserError(
            f"--to {to}: PaddleMIX supports only CLIP's tokenizer, and this is another; --to paddle writes the U-ViT "
            "alone"
        )


def paddlemix_scheduler(components: Components) -> dict[str, Any]:
    """The config of a DDIM scheduler: the source's own, if that is DDIM."""
    usual = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    config = {**scheduler_config(), **usual, "trained_betas": None}
    own = components.scheduler_config or {}
    if own.get("_class_name") == "DDIMScheduler":
        config = {key: own[key] for key in _DDIM_KEYS if key in own}
    else:
        components.report.defaulted.append("scheduler: DDIM, as in PaddleMIX's folders")
    return _ppdiffusers_class("DDIMScheduler") | config | {"prediction_type": components.conventions.prediction_type}


def _report_lost_conventions(
    components: Components, assumed: Conventions, reader: str, stores_prediction_type: bool = False
) -> None:
    """reader: the program that will read the weights, and that assumes these conventions."""
    conventions = components.conventions
    ours, theirs = (LatentSpace.recorded(asdict(each)) for each in (conventions, assumed))
    if ours.is_pixels:
        components.report.dropped.append(f"x_0 are pixels: {reader} decodes with a VAE; change it in its source code")
    elif ours != theirs:
        components.report.dropped.append(
            f"{ours.describe_latents()}: {reader} uses {theirs.latent_scale}; change it in its source code"
        )
    if conventions.timestep_labels != assumed.timestep_labels:
        components.report.dropped.append(
            f"timesteps {conventions.timestep_labels}: {reader} uses {assumed.timestep_labels}; "
            "change it in its source code"
        )
    if conventions.path != assumed.path:
        components.report.dropped.append(
            f"path {conventions.path}: {reader} uses {assumed.path}; change it in its source code"
        )
    if conventions.prediction_type != assumed.prediction_type and not stores_prediction_type:
        components.report.dropped.append(
            f"prediction type {conventions.prediction_type}: {reader} assumes {assumed.prediction_type}"
        )


def _write_configs(components: Components, folder: Path, names: tuple[Network, ...], reader: str) -> None:
    """Write COMPONENT.json of each network and the conventions. `uvit convert` reads them; other programs do not."""
    write_json(folder / CONVENTIONS, asdict(components.conventions))
    non_default = {"vqvae": vae.non_default_vae_config, "text_encoder": text.non_default_text_config}
    for name in names:
        if (network := getattr(components, name)) is None:
            continue
        config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
        private = {key for key in config if key.startswith("_")} | set(asdict(TRAINED))  # these are in CONVENTIONS
        write_json(folder / f"{name}.json", {key: value for key, value in config.items() if key not in private})
        for line in non_default[name](network) if name in non_default else ():
            components.report.dropped.append(
                f"{name}: {line}: set it in {reader}; only `uvit` reads it from {name}.json"
            )


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", tokens)
    settings = {"errors": "replace", "model_max_length": tokenizer.model_max_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**settings, **tokens, "tokenizer_class": "CLIPTokenizer"})


def _write_arrays(tensors: Mapping[str, Tensor], path: Path, layout: str) -> None:
    if path.suffix == ".pdparams":
        write_pdparams(path, tensors)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": layout})


def _ppdiffusers_class(name: str) -> dict[str, Any]:
    return {"_class_name": name, "_ppdiffusers_version": PPDIFFUSERS_VERSION}
