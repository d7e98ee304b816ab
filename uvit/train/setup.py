"""Build a run from its config: features, model, text encoder, optimizer, EMA; and check that they fit one another."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import uvit
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.conventions import Conventions, recorded_conventions
from uvit.device import init_device, keep_freed_memory
from uvit.distributed.mesh import World, single_process_world
from uvit.distributed.ops import GradientAverage, GradientNorm, on_main
from uvit.distributed.parallelize import check_divisibility, parallelize, shard
from uvit.errors import UserError
from uvit.lock import WriterLock
from uvit.model import INIT_STD, UViTT2IModel
from uvit.store.reader import open_features
from uvit.store.types import Features
from uvit.train.adamw import FusedAdamW
from uvit.train.alignment import build_projector
from uvit.train.checks import (
    check_features,
    check_named_encoders,
    check_pretrained,
    check_validation,
)
from uvit.train.clock import Clock
from uvit.train.ema import EMA, ema_decay
from uvit.train.epochs import samples_of_epochs
from uvit.train.guards import Guards, count_steps
from uvit.train.loader import BatchDataset
from uvit.train.muon import Muon
from uvit.train.optimizer import build_optimizer
from uvit.train.precision import Precision
from uvit.train.text import build_text_encoder, load_frozen_text_encoder
from uvit.weights.components import as_trained, load_vae, read_components
from uvit.weights.detect import FLAGS, first_that_has, is_third_party
from uvit.weights.encoders import assume_latent_space, is_local_path
from uvit.weights.pipeline_networks import check_unet_weights
from uvit.weights.unet import model_config, new_unet, unet_class

BATCH_FLAGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "dp_degree", "sharding_parallel_degree",
)  # fmt: skip
DEFAULT_SPLIT = TrainConfig.validation_split


@dataclass
class Run:
    """A training run, at `step` optimizer steps."""

    config: TrainConfig
    output_dir: Path
    device: torch.device
    features: Features
    validation: Features | None  # the features to validate on
    batches: BatchDataset
    master_model: nn.ModuleDict  # float32: unet, text_encoder if it is trained, and with --align projector
    optimizer: FusedAdamW | Muon
    ema: EMA | None
    precision: Precision
    conventions: Conventions  # what x_0 is, and what the model predicts
    frozen_text_encoder: Any | None  # encodes token ids, if the features have no text embeddings and it is not trained
    encoders: dict[str, str | None]  # vae, text_encoder, tokenizer: names or paths, for the final pipeline
    text_encoder_sha256: str | None  # of the one that made the text embeddings; None: it is trained, or unknown
    pad_token_id: int  # of the text encoder that is trained, or frozen
    max_steps: int  # the last step; see `plan_steps`
    schedule_steps: int  # how many steps the run would have if all of them had the batch of now
    world: World
    gradients: GradientAverage  # of the model that computes
    grad_norm: GradientNorm  # of the master model
    guards: Guards
    clock: Clock
    step: int = 0
    samples: int = 0  # the sample counter after the last step, over all processes
    checkpoint: Path | None = None  # the last one that it saved or resumed from
    resumed_from: str | None = None  # the last --resume_from_checkpoint: a name in the run's folder, or a whole path
    best: dict[str, Any] | None = None  # what best.json says: metric, value, step, checkpoint
    lock: WriterLock | None = None  # of the run's folder, in the main process
    replay: Callable[[Any], torch.Tensor] | None = None  # of forward and backward of a batch, as a CUDA graph
    before_update: Callable[[], None] = lambda: None  # waits until a checkpoint has copied the tensors

    @property
    def samples_per_step(self) -> int:
        return samples_per_step(asdict(self.config))

    @property
    def ema_model(self) -> nn.ModuleDict:
        """What is validated, previewed and exported: the EMA weights, or the trained ones without EMA."""
        return self.ema.model if self.ema else self.master_model  # type: ignore[return-value]

    def record(self) -> dict[str, Any]:
        """The contents of a checkpoint's uvit.json: enough to resume the run, and to convert it to a pipeline."""
        config, features = self.config, self.features
        return {
            "samples": self.samples,
            "resumed_from": self.resumed_from,
            "epochs": [list(astuple(each)) for each in self.batches.epochs],
            "best": self.best,
            "unet_config": model_config(self.master_model["unet"]),
            "text_encoder_config": text_encoder_config(self.master_model),
            **asdict(self.conventions),
            **self.encoders,
            "vae_sha256": features.vae_sha256,
            "text_encoder_sha256": self.text_encoder_sha256,
            "tokenizer_sha256": features.tokenizer_sha256,
            "teacher_sha256": features.teacher_sha256 if config.needs_teacher() else None,
            "loss_scale": self.precision.scale.state_dict(),
            "guards": self.guards.state_dict(),
            "degrees": str(self.world.degrees),
            "config": asdict(config),
            "versions": {"uvit": uvit.__version__, "torch": torch.__version__},
            "num_threads": torch.get_num_threads(),
            "allocator": keep_freed_memory() if self.world.device.type == "cpu" else "system",
        }


def samples_per_step(config: Mapping[str, Any]) -> int:
    """Samples of an optimizer step, over all processes. `config`: the fields of a TrainConfig."""
    return math.prod(config[flag] for flag in BATCH_FLAGS)


def text_encoder_config(model: nn.ModuleDict) -> dict[str, Any] | None:
    """The config of the text encoder that is trained, if one is."""
    if "text_encoder" not in model:
        return None
    encoder: Any = model["text_encoder"]
    return json.loads(encoder.config.to_json_string())


def build_run(config: TrainConfig, output_dir: Path, world: World | None = None) -> Run:
    """A run at step 0. Raises UserError if features, model and flags contradict one another.

    All processes of a world call this alike. Without a world, this process is the only one. In a world on the meta
    device, the run has shapes and no weights, and stands for the first of any number of processes.
    """
    world = world or single_process_world(config.device)
    device = world.device
    features = open_features(config.feature_path, "train", "feature_path")
    check_pretrained(config, features)
    torch.manual_seed(config.seed)
    unet = build_unet(config, device)
    encoders = encoder_sources(config, features)
    # By one process for all: a VAE of the Hub may be in the cache of one machine and not of another.
    conventions = on_main(lambda: training_conventions(config, features, unet, encoders["vae"]), world)
    unet.register_to_config(**asdict(conventions))
    use_tokens = config.train_text_encoder or features.context_shape is None
    check_features(config, features, unet, use_tokens, "feature_path", config.feature_path)
    check_named_encoders(config, features, unet)
    validation = open_validation(config, features, unet, use_tokens)
    master_model = nn.ModuleDict({"unet": unet})
    frozen, text_encoder_sha256, pad_token_id = None, None, 0
    if config.train_text_encoder:
        master_model["text_encoder"], pad_token_id = build_text_encoder(config, features, unet, device)
    elif use_tokens:
        frozen, pad_token_id, text_encoder_sha256 = load_frozen_text_encoder(config, features, unet)
        frozen.to(device, torch.bfloat16 if config.bf16 and device.type == "cuda" else torch.float32)
    else:
        text_encoder_sha256 = features.text_encoder_sha256
    if config.align != "none":
        with init_device(device):
            master_model["projector"] = build_projector(config, unet, features)
    master_model.to(device).train()
    decay = ema_decay(config, config.max_steps)
    ema = EMA(master_model, decay, config.ema_update_steps, config.ema_lengths) if config.use_ema else None
    precision = Precision(config, master_model, device)
    parallelize_models(config, world, master_model, precision.compute_model, ema.models if ema else [])
    optimizer = build_optimizer(master_model, config, world)
    run = Run(
        config=config,
        output_dir=output_dir,
        device=device,
        features=features,
        validation=validation,
        batches=BatchDataset(
            features, config.per_device_train_batch_size, config.seed, use_tokens=use_tokens, config=config
        ),
        master_model=master_model,
        optimizer=optimizer,
        ema=ema,
        precision=precision,
        conventions=conventions,
        frozen_text_encoder=frozen,
        encoders=encoders,
        text_encoder_sha256=text_encoder_sha256,
        pad_token_id=pad_token_id,
        max_steps=config.max_steps,
        schedule_steps=config.max_steps,
        world=world,
        gradients=GradientAverage(precision.compute_model, world, master=master_model),
        grad_norm=GradientNorm(master_model.parameters(), world),
        guards=Guards(config.spike_factor, device),
        clock=Clock(device),
    )
    plan_steps(run)
    return run


def plan_steps(run: Run) -> None:
    """Set the last step: --max_steps, or that after which --num_train_epochs passes over the data are complete.

    The default of --ema_decay follows from it. What is left of the epochs follows from the sample counter. So it does
    not matter which batches there were before.
    """
    config = run.config
    if config.num_train_epochs:
        end = samples_of_epochs(run.batches.epochs, config.num_train_epochs)
        left = count_steps(run.samples, end, run.samples_per_step, run.guards.skipped_samples)
        run.max_steps, run.schedule_steps = run.step + left, -(-end // run.samples_per_step)
    if run.ema:
        run.ema.decay = ema_decay(config, run.schedule_steps)


def encoder_sources(config: TrainConfig, features: Features) -> dict[str, str | None]:
    """Names or paths: of the pipeline to start from if it has them, or else of a flag, or else of the features."""
    pretrained = config.pretrained_model_name_or_path
    vae = first_that_has("vqvae", pretrained, config.vae_name_or_path, features.vae_name)
    return {
        "vae": None if features.is_pixels else vae,
        "text_encoder": first_that_has(
            "text_encoder", pretrained, config.text_encoder_name_or_path, features.text_encoder_name
        ),
        "tokenizer": first_that_has("tokenizer", pretrained, config.tokenizer_name, features.tokenizer_name),
    }


def training_conventions(
    config: TrainConfig, features: Features, unet: UViTT2IModel, vae_name: str | None
) -> Conventions:
    """What x_0 is: as the features record it, else the model to start from, else the VAE. And what is predicted.

    Prints where a model to start from was trained otherwise.
    """
    before: Mapping[str, Any] = unet.config
    trained = as_trained(Conventions.recorded(before))
    if features.latent_space is not None:
        space = features.latent_space
        if config.latent_scale is not None and space.is_pixels:
            raise UserError(
                f"--latent_scale {config.latent_scale}: --feature_path {config.feature_path} holds pixels, which are "
                "not scaled; leave it out"
            )
        if config.latent_scale is not None:
            space = replace(space, latent_scale=config.latent_scale)
    elif before["latent_scale"] is not None and not trained.is_pixels:
        space = trained if config.latent_scale is None else replace(trained, latent_scale=config.latent_scale)
    else:
        try:
            with torch.random.fork_rng([]):  # this process alone loads it, but all have the same initial weights
                vae = load_vae(vae_name) if vae_name else None
        except UserError:
            if is_local_path(str(vae_name)) or Path(str(vae_name)).exists():
                raise
            vae = None  # a Hub id that cannot be loaded here
        space = assume_latent_space(vae, vae_name, config.latent_scale)
    conventions = Conventions.recorded(
        {**asdict(space), "prediction_type": config.prediction_type, "path": config.path}
    )
    for key in recorded_conventions(before):
        if getattr(trained, key) != (now := getattr(conventions, key)):
            print(
                f"warning: --pretrained_model_name_or_path {config.pretrained_model_name_or_path}: was trained with "
                f"{key} {getattr(trained, key)}, and this run trains it with {now}"
            )
    return conventions


def parallelize_models(
    config: TrainConfig,
    world: World,
    master_model: nn.ModuleDict,
    compute_model: nn.ModuleDict,
    ema_models: list[nn.Module],
) -> None:
    """Distribute the models over the processes, each alike; some of them may be the same model."""
    if world.device.type == "meta":  # a dry run: the other processes do not exist
        check_divisibility(master_model["unet"].mid_block, world)  # type: ignore[arg-type]
        return
    for model in dict.fromkeys([master_model, compute_model, *ema_models]):
        computes = model is compute_model
        unet: Any = model["unet"]  # type: ignore[index]
        parallelize(unet, world, recompute=computes and config.recompute, compile=computes and bool(config.compile))
        for name, network in model.items():  # type: ignore[operator]
            if name != "unet":
                shard(network, world)


def open_validation(config: TrainConfig, features: Features, unet: UViTT2IModel, use_tokens: bool) -> Features | None:
    """The features to validate on, or None. Only the default split may be missing."""
    if config.eval_steps == -1:
        return None
    split, flag, path = config.validation_split, "feature_path", config.feature_path
    if config.validation_feature_path:
        flag, path = "validation_feature_path", config.validation_feature_path
    elif split == DEFAULT_SPLIT and not (Path(path) / split).is_dir():
        return None
    validation = open_features(path, split, flag)
    check_features(config, validation, unet, use_tokens, flag, path)
    check_validation(config, features, validation, flag, path)
    return validation


def build_unet(config: TrainConfig, device: torch.device) -> UViTT2IModel:
    if config.pretrained_model_name_or_path is None:
        with init_device(device):
            unet = new_unet(resolve_model_config(config.uvit_config_file))
        rescale_initialisation(unet, config.weight_init_std, config.position_init_std)
        return unet
    name = config.pretrained_model_name_or_path
    if is_third_party(name):
        components = read_components(Path(name), overridden=set(FLAGS))
        if components.unet is None:
            raise UserError(f"--pretrained_model_name_or_path {name}: has no U-ViT, but {components.report}")
        print(f"starts from {'; '.join(components.report.read)}")
        return components.unet.requires_grad_(True)
    if is_local_path(name) and not Path(name).exists():
        raise UserError(f"--pretrained_model_name_or_path {name}: there is no such file or folder")
    try:
        saved: dict[str, Any] = UViTT2IModel.load_config(name, subfolder="unet")
        unet = unet_class(saved).from_pretrained(name, subfolder="unet", use_safetensors=True)
        if Path(name).is_dir():
            check_unet_weights(unet, Path(name))
        print(f"starts from the U-ViT of {name}")
        return unet
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # there is none, or it is damaged
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--pretrained_model_name_or_path {name}: has no U-ViT in unet/ ({reason})") from None


@torch.no_grad()
def rescale_initialisation(unet: UViTT2IModel, weight_std: float, position_std: float) -> None:
    """Rescale initial linear weights and position embeddings from INIT_STD to these standard deviations."""
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(weight_std / INIT_STD)
    unet.pos_embed.mul_(position_std / INIT_STD)
