"""A model in the formats of the official code and of the Paddle port, so that they read it.

What cannot be said in a format is refused or reported; nothing is bent to fit. Weights go through bit for bit.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from uvit.diffusion import alphas_cumprod, scheduler_config
from uvit.errors import UserError
from uvit.io import write_json
from uvit.weights import text_encoder as text
from uvit.weights import unet as uvit
from uvit.weights import vae
from uvit.weights.components import CONVENTIONS, PORT, TRAINED, Components, Conventions
from uvit.weights.detect import CONFIG, FLAGS, INDEX, Network
from uvit.weights.pdparams import write_pdparams

ExportContainer = Literal["safetensors", "pdparams"]
PORT_VERSION = "0.29.0"  # the ppdiffusers whose folders these are
UNET_FILE = {"safetensors": "diffusion_paddle_model.safetensors", "pdparams": "model_state.pdparams"}
TEXT_FILE = {"safetensors": "model.safetensors", "pdparams": "model_state.pdparams"}

# The keys of the port's configs; later ones of diffusers and transformers it does not know.
_UVIT_EXTRA = {
    "attn_drop_rate": 0.0,
    "drop_rate": 0.0,
    "norm_type": "layer_norm",
    "out_channels": None,
    "pos_drop_rate": 0.0,
    "qk_scale": None,
}
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


# The official code


def write_official(parts: Components, folder: Path, averaged: bool = True) -> None:
    """nnet_ema.pth, nnet.pth and autoencoder_kl.pth, as far as the source has them, and for `uvit` their configs.

    averaged: whether the U-ViT's weights are.
    """
    config = parts.unet.config
    if not isinstance(config["sample_size"], int):
        raise UserError(f"--to official: its U-ViT is square, and this one's sample_size is {config['sample_size']}")
    save_pth(parts.unet.state_dict(), folder / ("nnet_ema.pth" if averaged else "nnet.pth"))
    if parts.raw_unet is not None:
        save_pth(parts.raw_unet, folder / "nnet.pth")
    if parts.vqvae is not None:
        weights = vae.to_ldm(parts.vqvae.state_dict(), len(parts.vqvae.config["block_out_channels"]))
        save_pth(weights, folder / "autoencoder_kl.pth")
    parts.report.converted.append(
        f"for the official code: UViT(img_size={config['sample_size']}, patch_size={config['patch_size']}, "
        f"in_chans={config['in_channels']}, embed_dim={config['num_attention_heads'] * config['attention_head_dim']}, "
        f"depth={config['num_layers']}, num_heads={config['num_attention_heads']}, mlp_ratio={config['mlp_ratio']}, "
        f"qkv_bias={config['qkv_bias']}, clip_dim={config['clip_dim']}, num_clip_token={config['num_text_tokens']}, "
        f"conv={config['conv']})"
    )
    _write_configs(parts, folder, ("unet", "vqvae"), "the official code")
    _say_what_is_lost(parts, TRAINED, "the official code")


def save_pth(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises OSError where the disk does not take it."""
    with path.open("wb") as file:
        sink: Any = _Sink(file)
        torch.save({name: value.detach().clone().contiguous() for name, value in tensors.items()}, sink)
        if sink.error is not None:
            raise sink.error


class _Sink:
    """A file for torch's writer. Told that a disk is full it may end the process, so `error` says it afterwards."""

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


# The Paddle port


def write_paddle(parts: Components, folder: Path, container: ExportContainer) -> None:
    """The U-ViT's folder: its weights in Paddle's layout, and its config.json."""
    _write_unet(parts, folder, container)
    write_json(folder / CONVENTIONS, asdict(parts.conventions))
    _say_what_is_lost(parts, PORT, "the port's pipeline")


def _write_unet(parts: Components, folder: Path, container: ExportContainer) -> None:
    weights = uvit.transpose_unet(parts.unet.state_dict())
    _write_arrays(weights, folder / UNET_FILE[container], "pd")
    write_json(folder / CONFIG, {**_of_port("UViTT2IModel"), **_UVIT_EXTRA, **_plain(parts.unet.config)})


def write_port(parts: Components, folder: Path, container: ExportContainer) -> None:
    """The pipeline's folder. Raises UserError where the port has no such encoder, tokenizer or VAE."""
    check_encoders(parts, "port")
    for name in ("unet", "vqvae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
    _write_unet(parts, folder / "unet", container)
    autoencoder, encoder = parts.vqvae, parts.text_encoder
    _write_arrays(vae.transpose_vae(autoencoder.state_dict()), folder / "vqvae" / UNET_FILE[container], "pd")
    said = {key: autoencoder.config[key] for key in _VAE_KEYS if key in autoencoder.config}
    write_json(folder / "vqvae" / CONFIG, _of_port("AutoencoderKL") | said)
    weights = {text.PREFIX + name: value for name, value in text.transpose_text_encoder(encoder.state_dict()).items()}
    _write_arrays(weights, folder / "text_encoder" / TEXT_FILE[container], "np")
    settings = encoder.config.to_dict()
    said = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    write_json(folder / "text_encoder" / CONFIG, {"architectures": ["CLIPTextModel"], **said})
    _write_tokenizer(parts.tokenizer, folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", port_scheduler(parts))
    libraries = {"scheduler": "ppdiffusers", "text_encoder": "ppdiffusers.transformers"}
    libraries |= {"tokenizer": "ppdiffusers.transformers", "unet": "ppdiffusers", "vqvae": "ppdiffusers"}
    classes = {"scheduler": "DDIMScheduler", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    classes |= {"unet": "UViTT2IModel", "vqvae": "AutoencoderKL"}
    index = {name: [library, classes[name]] for name, library in libraries.items()}
    write_json(folder / INDEX, _of_port("LDMTextToImageUViTPipeline") | index)
    write_json(folder / CONVENTIONS, asdict(parts.conventions))
    _say_what_is_lost(parts, PORT, "the port's pipeline", says_prediction=True)


def write_trainer(parts: Components, folder: Path) -> None:
    """model_state.pdparams as the port's trainer resumes from. Its LayerNorms have no weight and bias."""
    weights = uvit.transpose_unet(parts.unet.state_dict())
    for name, value in (weights | (parts.raw_unet or {})).items():
        if uvit.is_norm(name) and not torch.equal(value, torch.full_like(value, name.endswith("weight"))):
            raise UserError(
                f"--to trainer: the port's trainer has no {name}, and this model's is not 1 and 0; use --to port"
            )
    ema = {name: value for name, value in weights.items() if not uvit.is_norm(name)}
    raw = ema
    if parts.raw_unet is not None:
        raw = {n: v for n, v in uvit.transpose_unet(parts.raw_unet).items() if not uvit.is_norm(n)}
    else:
        parts.report.defaulted.append("unet.* and model_ema.* are alike: the source has one set of weights")
    content = {"alphas_cumprod": alphas_cumprod()[1:].float()}
    if parts.text_encoder is not None:
        check_encoders(parts, "trainer", whole=False)
        linear = text.transpose_text_encoder(parts.text_encoder.state_dict())
        content |= {f"text_encoder.{text.paddlenlp_name(name)}": value for name, value in linear.items()}
    if parts.vqvae is not None:
        linear = vae.transpose_vae(parts.vqvae.state_dict())
        content |= {f"vae.{name}": value for name, value in linear.items()}
    content |= {f"unet.{name}": value for name, value in raw.items()}
    content |= {f"model_ema.{name.replace('.', '')}": value for name, value in ema.items()}
    write_pdparams(folder / "model_state.pdparams", content)
    _write_configs(parts, folder, ("unet", "vqvae", "text_encoder"), "the port's trainer")
    _say_what_is_lost(parts, TRAINED, "the port's trainer")


def check_encoders(parts: Components, to: str, whole: bool = True) -> None:
    """Raises UserError where the port has no such part."""
    missing = [name for name in FLAGS if getattr(parts, name) is None]
    if missing and whole:
        wanted = ", ".join(f"--{FLAGS[name]}" for name in missing)
        raise UserError(
            f"--to {to}: a whole pipeline is needed, and the source has no {', '.join(missing)}; name {wanted}"
        )
    if not isinstance(parts.text_encoder, CLIPTextModel):
        raise UserError(
            f"--to {to}: the port's text encoder is CLIP's, and this is {type(parts.text_encoder).__name__}; "
            "--to paddle writes the U-ViT alone"
        )
    if parts.vqvae is not None and not parts.vqvae.config.get("mid_block_add_attention", True):
        raise UserError(f"--to {to}: the port's VAE has attention in its middle, and this one has none")
    model = getattr(getattr(parts.tokenizer, "backend_tokenizer", None), "model", None)
    if whole and getattr(model, "end_of_word_suffix", None) != "</w>":
        raise UserError(
            f"--to {to}: the port's tokenizer is CLIP's byte pairs, and this is another; --to paddle writes the U-ViT "
            "alone"
        )


def port_scheduler(parts: Components) -> dict[str, Any]:
    """A DDIM scheduler's config, the source's own where it is one."""
    usual = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    config = {**scheduler_config(), **usual, "trained_betas": None}
    own = parts.scheduler_config or {}
    if own.get("_class_name") == "DDIMScheduler":
        config = {key: own[key] for key in _DDIM_KEYS if key in own}
    else:
        parts.report.defaulted.append("scheduler: DDIM, as in the port's folders")
    return _of_port("DDIMScheduler") | config | {"prediction_type": parts.conventions.prediction_type}


def _say_what_is_lost(parts: Components, theirs: Conventions, reader: str, says_prediction: bool = False) -> None:
    said = parts.conventions
    if said.latent_scale != theirs.latent_scale:
        parts.report.left.append(
            f"latent scale {said.latent_scale}: {reader} has {theirs.latent_scale} in its code; change it there"
        )
    if said.timestep_labels != theirs.timestep_labels:
        labels = f"timestep labels {said.timestep_labels}"
        parts.report.left.append(f"{labels}: {reader} has {theirs.timestep_labels} in its code")
    if said.prediction_type != theirs.prediction_type and not says_prediction:
        parts.report.left.append(
            f"prediction type {said.prediction_type}: {reader} takes it for {theirs.prediction_type}"
        )


def _write_configs(parts: Components, folder: Path, names: tuple[Network, ...], reader: str) -> None:
    """PART.json of each network and the conventions, which `uvit convert` reads and others do not."""
    write_json(folder / CONVENTIONS, asdict(parts.conventions))
    beyond = {"vqvae": vae.non_default_vae_config, "text_encoder": text.non_default_text_config}
    for name in names:
        if (network := getattr(parts, name)) is None:
            continue
        config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
        write_json(folder / f"{name}.json", _plain(config))
        for line in beyond[name](network) if name in beyond else ():
            parts.report.left.append(f"{name}: {line}: {reader} must be told; {name}.json, for `uvit`, says it")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", tokens)
    said = {"errors": "replace", "model_max_length": tokenizer.model_max_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**said, **tokens, "tokenizer_class": "CLIPTokenizer"})


def _write_arrays(tensors: Mapping[str, Tensor], path: Path, said: str) -> None:
    if path.suffix == ".pdparams":
        write_pdparams(path, tensors)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": said})


def _of_port(name: str) -> dict[str, Any]:
    return {"_class_name": name, "_ppdiffusers_version": PORT_VERSION}
