"""The one definition of the diffusion process: schedule, noising, targets, losses and the latent space.

Variance-preserving diffusion with 1000 steps (DDPM, Ho et al. 2020), x_n = a_n x_0 + s_n eps with a_n^2 + s_n^2 = 1.
Training, sampling, previews and conversion take their constants from here.

Shapes: latents, noise and predictions (B, C, H, W); timesteps (B,), n in 1..1000.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
LATENT_SCALE = 0.23010  # for the Stable Diffusion VAE, as in U-ViT; a model stores the one that it was trained with
CONTEXT_DROP_PROBABILITY = 0.1  # an empty caption replaces the caption, for guidance
TIMESTEP_OFFSETS = {"1..1000": 1, "0..999": 0}  # timestep_labels -> `denoise`'s timestep_offset

PredictionType = Literal["epsilon", "v_prediction", "sample"]


# The schedule


@functools.cache
def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """abar_n for n = 0..1000, (1001,), float64: abar_0 = 1, abar_n = prod of the first n (1 - beta). DDPM eq. 4."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)]).to(device)


def log_snr(timesteps: Tensor) -> Tensor:
    """log(a_n^2 / s_n^2), (B,) float64, for timesteps in 1..1000; fractional ones are interpolated linearly."""
    abar = alphas_cumprod(timesteps.device)[1:]
    table = torch.log(abar) - torch.log1p(-abar)  # index n - 1
    position = (timesteps.double() - 1).clamp(0, NUM_TIMESTEPS - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=NUM_TIMESTEPS - 1)
    return torch.lerp(table[below], table[above], position - below)


def timestep_of_log_snr(value: Tensor) -> Tensor:
    """The timestep, a float in 1..1000, whose log-SNR is `value`: the inverse of `log_snr`."""
    table = log_snr(torch.arange(NUM_TIMESTEPS, 0, -1, device=value.device))  # rising
    above = torch.searchsorted(table, value.double().contiguous()).clamp(1, NUM_TIMESTEPS - 1)
    low, high = table[above - 1], table[above]
    return NUM_TIMESTEPS - (above - 1 + ((value - low) / (high - low)).clamp(0, 1))


def signal_and_noise(timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a_n, s_n), each (B, 1, 1, 1) in the dtype of `like`."""
    value = log_snr(timesteps.to(like.device)).view(-1, *[1] * (like.ndim - 1))
    return torch.sigmoid(value).sqrt().to(like.dtype), torch.sigmoid(-value).sqrt().to(like.dtype)


def add_noise(x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_n = a_n x_0 + s_n eps."""
    a, s = signal_and_noise(timesteps, x_0)
    return a * x_0 + s * noise


# What the network predicts


def target(x_0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: PredictionType) -> Tensor:
    """What a perfect network would predict. v = a_n eps - s_n x_0 (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    a, s = signal_and_noise(timesteps, x_0)
    return a * noise - s * x_0


def split_prediction(
    prediction: Tensor, x_n: Tensor, timesteps: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """(x_0, eps) that a prediction at x_n stands for."""
    a, s = signal_and_noise(timesteps, x_n)
    if prediction_type == "epsilon":
        return (x_n - s * prediction) / a, prediction
    if prediction_type == "sample":
        return prediction, (x_n - a * prediction) / s
    return a * x_n - s * prediction, s * x_n + a * prediction


def convert_prediction(
    prediction: Tensor, x_n: Tensor, timesteps: Tensor, from_type: PredictionType, to_type: PredictionType
) -> Tensor:
    """The same prediction in another parametrisation, so that any model samples with any scheduler."""
    if from_type == to_type:
        return prediction
    x_0, noise = split_prediction(prediction, x_n, timesteps, from_type)
    return target(x_0, noise, timesteps, to_type)


# The loss


def loss_weight(timesteps: Tensor, prediction_type: PredictionType, snr_gamma: float | None) -> Tensor:
    """Weight of each sample's loss, (B,) float32: 1, or min-SNR-gamma's (Hang et al. 2023) for that prediction."""
    if snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    snr = log_snr(timesteps).exp()
    clipped = snr.clamp(max=snr_gamma)
    weight = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction_type]
    return weight.float()


def loss(
    prediction: Tensor,
    x_0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prediction_type: PredictionType = "epsilon",
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean over C, H, W of (prediction - target)^2, weighted, then over the batch. A float32 scalar."""
    error = prediction.float() - target(x_0, noise, timesteps, prediction_type).float()
    return (error.square().mean(dim=(1, 2, 3)) * loss_weight(timesteps, prediction_type, snr_gamma)).mean()


# The latent space


PerChannel = float | tuple[float, ...]  # one number for all latent channels, or one for each
MAX_NUMBER = torch.finfo(torch.float32).max  # of a latent space


@dataclass(frozen=True)
class LatentSpace:
    """What a U-ViT is trained on, x_0, of a VAE's latents z: x_0 = latent_scale (z - latent_shift) / latent_std.

    So do the pipelines of diffusers, with a VAE's `scaling_factor` and either its `shift_factor` or its `latents_mean`
    and `latents_std`. Raises ValueError for numbers that are none of a latent space.
    """

    latent_scale: float = LATENT_SCALE
    latent_shift: PerChannel = 0.0
    latent_std: PerChannel = 1.0

    def __post_init__(self) -> None:
        for name in ("latent_scale", "latent_shift", "latent_std"):
            value = getattr(self, name)
            per_channel = isinstance(value, list | tuple) and name != "latent_scale"
            lowest = -MAX_NUMBER if name == "latent_shift" else 0.0
            for number in value if per_channel else [value]:
                is_number = isinstance(number, int | float) and not isinstance(number, bool)
                if not is_number or not lowest < number < MAX_NUMBER:
                    raise ValueError(f"{name} is {value!r}, but must be {'above 0' if lowest == 0 else 'a number'}")
            object.__setattr__(self, name, tuple(map(float, value)) if per_channel else float(value))

    @classmethod
    def recorded(cls, content: Mapping[str, Any]) -> Self:
        """What a file or a config records. What it lacks, or has as null, is the default: no shift, for example."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: content[name] for name in names if content.get(name) is not None})

    def normalize(self, latents: Tensor) -> Tensor:
        """The VAE's latents (B, C, h, w) -> x_0, in the same dtype."""
        if self.latent_shift != 0:
            latents = latents - _per_channel(self.latent_shift, latents)
        latents = latents * self.latent_scale
        return latents if self.latent_std == 1 else latents / _per_channel(self.latent_std, latents)

    def denormalize(self, x_0: Tensor) -> Tensor:
        """x_0 (B, C, h, w) -> the VAE's latents, in the same dtype."""
        if self.latent_std != 1:
            x_0 = x_0 * _per_channel(self.latent_std, x_0)
        latents = x_0 / self.latent_scale
        return latents if self.latent_shift == 0 else latents + _per_channel(self.latent_shift, latents)

    def check_channels(self, channels: int) -> None:
        """Raises ValueError if there is not one number for each of the latent channels."""
        for name in ("latent_shift", "latent_std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != channels:
                raise ValueError(f"{name} has {len(value)} numbers, but the latents have {channels} channels")

    def describe_latents(self) -> str:
        """As in "latent scale 0.5, shift 0.1": shift and standard deviation only where there are any."""
        values = {"shift": (self.latent_shift, 0), "standard deviation": (self.latent_std, 1)}
        texts = [f"latent scale {self.latent_scale:g}"]
        for name, (value, none) in values.items():
            if isinstance(value, tuple):
                texts.append(f"{name} ({', '.join(f'{number:g}' for number in value)})")
            elif value != none:
                texts.append(f"{name} {value:g}")
        return ", ".join(texts)


@dataclass(frozen=True)
class Conventions(LatentSpace):
    """What else must be known of a U-ViT to sample with it. Its config.json has these settings.

    - `timestep_labels`: the timesteps that the network gets, from the least to the most noise: "1..1000" as trained,
      or "0..999" as PaddleMIX passes them.
    - `prediction_type`: what the network predicts, whatever the scheduler expects.
    """

    timestep_labels: str = "1..1000"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"timestep_labels": tuple(TIMESTEP_OFFSETS), "prediction_type": get_args(PredictionType)}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, known))}")


def recorded_conventions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `Conventions` that a U-ViT's config has. A latent scale alone stands for no shift."""
    names = [field.name for field in fields(Conventions) if config.get(field.name) is not None]
    space = asdict(LatentSpace.recorded(config)) if "latent_scale" in names else {}
    return space | {name: getattr(Conventions.recorded(config), name) for name in names}


def record_conventions(unet: Any, given: Mapping[str, Any]) -> None:
    """Record the conventions that are given in the U-ViT's config. Raises ValueError where it has others."""
    recorded = recorded_conventions(unet.config)
    given = {key: value for key, value in given.items() if value is not None}
    given = {key: getattr(Conventions.recorded(given), key) for key in given}
    for key, value in given.items():
        if recorded.get(key, value) != value:
            raise ValueError(
                f"{key} is {value!r} here, but {recorded[key]!r} in the U-ViT's own config (unet/config.json, or "
                "unet.config); leave it out, or change it there"
            )
    unet.register_to_config(**given)


def draw_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """A sample of the VAE's posterior, z: moments (B, 2 C, h, w), noise (B, C, h, w), float32."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise


def _per_channel(value: PerChannel, like: Tensor) -> Tensor | float:
    return like.new_tensor(value).view(-1, 1, 1) if isinstance(value, tuple) else value


# For diffusers schedulers


def scheduler_config(prediction_type: PredictionType = "epsilon") -> dict[str, Any]:
    """The schedule as settings of a diffusers scheduler."""
    return {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }


def from_scheduler_timestep(t: Tensor) -> Tensor:
    """The network's timestep, 1..1000, of a diffusers scheduler's timestep t in 0..999."""
    return t + 1
