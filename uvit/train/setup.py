"""From a config to all that a run works with: features, networks, optimizer, EMA; and the checks between them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

import uvit
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.data.encoders import load_text_encoder, load_tokenizer
from uvit.data.features import Features, open_features
from uvit.data.loader import Batches
from uvit.device import pick_device
from uvit.diffusion import LATENT_SCALE
from uvit.errors import UserError
from uvit.model import INIT_STD, UViTT2IModel
from uvit.train.ema import EMA
from uvit.train.optim import build_optimizer
from uvit.train.precision import Precision


@dataclass
class Run:
    """A training run, at `step` optimizer steps."""

    config: TrainConfig
    output_dir: Path
    device: torch.device
    features: Features
    batches: Batches
    networks: nn.ModuleDict  # unet, and text_encoder where it is trained; float32
    optimizer: torch.optim.AdamW
    ema: EMA | None
    precision: Precision
    latent_scale: float
    pad_token_id: int  # of the text encoder that is trained
    max_steps: int
    step: int = 0

    @property
    def samples_per_step(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def averaged(self) -> nn.ModuleDict:
        """The networks that people get to see: the EMA's, where there is one."""
        return self.ema.model if self.ema else self.networks  # type: ignore[return-value]

    def parameter_names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.networks.named_parameters()}

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself: enough to resume, and to make a pipeline of it."""
        config, features = self.config, self.features
        pretrained = config.pretrained_model_name_or_path
        return {
            "samples": self.step * self.samples_per_step,
            "unet_config": model_config(self.networks["unet"]),
            "text_encoder_config": text_encoder_config(self.networks),
            "prediction_type": config.prediction_type,
            "latent_scale": self.latent_scale,
            "vae": pretrained or config.vae_name_or_path or features.vae_name,
            "text_encoder": pretrained or config.text_encoder_name_or_path or features.text_encoder_name,
            "tokenizer": pretrained or config.tokenizer_name or features.tokenizer_name,
            "scaler": self.precision.scaler.state_dict(),
            "config": asdict(config),
            "versions": {"uvit": uvit.__version__, "torch": torch.__version__},
            "num_threads": torch.get_num_threads(),
        }


def text_encoder_config(networks: nn.ModuleDict) -> dict[str, Any] | None:
    """Of the text encoder that is trained, if one is."""
    if "text_encoder" not in networks:
        return None
    encoder: Any = networks["text_encoder"]
    return json.loads(encoder.config.to_json_string())


def model_config(unet: Any) -> dict[str, Any]:
    """The constructor's arguments, without what diffusers adds."""
    return {key: value for key, value in unet.config.items() if not key.startswith("_")}


def set_up(config: TrainConfig, output_dir: Path) -> Run:
    """A run at step 0. Raises UserError where features, model and flags contradict one another."""
    device = pick_device(config.device)
    features = open_features(config.feature_path)
    torch.manual_seed(config.seed)
    unet = build_unet(config)
    check_features(config, features, unet)
    networks = nn.ModuleDict({"unet": unet})
    pad_token_id = 0
    if config.train_text_encoder:
        networks["text_encoder"], pad_token_id = build_text_encoder(config, features, unet)
    networks.to(device).train()
    optimizer = build_optimizer(networks, config)
    ema = EMA(networks, config.ema_decay) if config.use_ema else None
    precision = Precision(config, networks, device)
    worker: Any = precision.networks["unet"]
    if config.recompute:
        worker.enable_gradient_checkpointing()
    if config.compile:
        worker.compile()
    run = Run(
        config=config,
        output_dir=output_dir,
        device=device,
        features=features,
        batches=Batches(
            features,
            config.per_device_train_batch_size,
            config.seed,
            use_tokens=config.train_text_encoder,
            noise_offset=config.noise_offset,
        ),
        networks=networks,
        optimizer=optimizer,
        ema=ema,
        precision=precision,
        latent_scale=config.latent_scale or features.latent_scale or LATENT_SCALE,
        pad_token_id=pad_token_id,
        max_steps=config.max_steps,
    )
    if config.num_train_epochs:
        run.max_steps = max(1, round(config.num_train_epochs * features.num_samples / run.samples_per_step))
    return run


def build_unet(config: TrainConfig) -> UViTT2IModel:
    if config.pretrained_model_name_or_path is None:
        unet = UViTT2IModel(**resolve_model_config(config.uvit_config_file))
        rescale_initialisation(unet, config.weight_init_std, config.position_init_std)
        return unet
    name = config.pretrained_model_name_or_path
    try:
        return UViTT2IModel.from_pretrained(name, subfolder="unet", use_safetensors=True)
    except OSError as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: has no U-ViT in unet/ ({error})") from None


@torch.no_grad()
def rescale_initialisation(unet: UViTT2IModel, weight_std: float, position_std: float) -> None:
    """Give fresh linear weights and position embeddings, both of std INIT_STD, these standard deviations."""
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(weight_std / INIT_STD)
    unet.pos_embed.mul_(position_std / INIT_STD)


def build_text_encoder(config: TrainConfig, features: Features, unet: UViTT2IModel) -> tuple[PreTrainedModel, int]:
    """-> (the text encoder to train, the padding token's id): an existing one, or a small CLIP's from scratch."""
    pretrained = config.pretrained_model_name_or_path
    tokenizer = load_tokenizer(pretrained or config.tokenizer_name or features.tokenizer_name or "")
    pad_token_id = tokenizer.pad_token_id or 0
    name = pretrained or config.text_encoder_name_or_path
    if name is not None:
        encoder = load_text_encoder(name).requires_grad_(True)
        if encoder.config.hidden_size != unet.config.clip_dim:
            raise UserError(
                f"--text_encoder_name_or_path {name}: its width is {encoder.config.hidden_size}, the U-ViT's clip_dim "
                f"{unet.config.clip_dim}; choose another --uvit_config_file"
            )
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


def check_features(config: TrainConfig, features: Features, unet: UViTT2IModel) -> None:
    """Every contradiction between store, model and flags, before the first step."""
    path, model = config.feature_path, unet.config
    channels, height, width = features.moments_shape
    if channels != 2 * model.in_channels:
        raise UserError(
            f"--feature_path {path}: has latents of {channels // 2} channels, the model {model.in_channels}; "
            "choose another --uvit_config_file"
        )
    rows, columns = unet.grid
    p = unet.patch_size
    if height % p or width % p or height // p > rows or width // p > columns:
        raise UserError(
            f"--feature_path {path}: has latents of {height}x{width}, the model's sample_size is "
            f"{rows * p}x{columns * p}; choose another --uvit_config_file"
        )
    if config.train_text_encoder:
        num_tokens, what = features.num_tokens, "token ids"
        if num_tokens is None:
            raise UserError(f"--train_text_encoder: {path} has no token ids; extract with --text tokens or both")
    else:
        if features.context_shape is None:
            raise UserError(
                f"--feature_path {path}: has no contexts; extract with --text contexts, or pass --train_text_encoder"
            )
        num_tokens, clip_dim = features.context_shape
        what = "context tokens"
        if clip_dim != model.clip_dim:
            raise UserError(
                f"--feature_path {path}: has contexts of width {clip_dim}, the model's clip_dim is {model.clip_dim}; "
                "choose another --uvit_config_file"
            )
    if num_tokens != model.num_text_tokens:
        raise UserError(
            f"--feature_path {path}: has {num_tokens} {what} a caption, the model's num_text_tokens is "
            f"{model.num_text_tokens}; extract with --model_max_length {model.num_text_tokens}"
        )
    if config.model_max_length not in (None, num_tokens):
        raise UserError(
            f"--model_max_length {config.model_max_length}: the features have {num_tokens} tokens a caption"
        )
    if config.resolution is not None and features.resolution not in (None, config.resolution):
        raise UserError(f"--resolution {config.resolution}: the features were extracted at {features.resolution}")
