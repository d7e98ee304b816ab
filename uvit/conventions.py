"""How to sample with a U-ViT: its latent space, its timesteps and what it predicts. Needs no torch.

Shapes: latents (B, C, h, w). A U-ViT may work on pixels, without a VAE. Its latents are then images (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

if TYPE_CHECKING:
    from torch import Tensor

LATENT_SCALE = 0.23010  # for the Stable Diffusion VAE, as in U-ViT; a model stores the one that it was trained with
TIMESTEP_OFFSETS = {"1..1000": 1, "0..999": 0}  # timestep_labels -> `denoise`'s timestep_offset

DiffusionPath = Literal["vp", "linear", "vp_zero_snr"]
Latents = Literal["vae", "pixels"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
LossType = Literal["prediction", "epsilon", "x", "v"]  # the space of its error, see `uvit.diffusion.loss_weight`
# What a network can predict on each path. The first is what schedulers of that path expect.
PREDICTION_TYPES: dict[str, tuple[PredictionType, ...]] = {
    "vp": ("epsilon", "v_prediction", "sample"),
    "linear": ("flow_prediction", "sample"),
    "vp_zero_snr": ("v_prediction", "sample"),
}
PerChannel = float | tuple[float, ...]  # one number for all latent channels, or one for each
MAX_NUMBER = 3.4028234663852886e38  # of float32


@dataclass(frozen=True)
class LatentSpace:
    """What a U-ViT is trained on, x_0, of a VAE's latents z: x_0 = latent_scale (z - latent_shift) / latent_std.

    So do the pipelines of diffusers, with a VAE's `scaling_factor` and either its `shift_factor` or its `latents_mean`
    and `latents_std`. With `latents` "pixels" there is no VAE, and x_0 is the image in [-1, 1]: see PIXELS. Raises
    ValueError for numbers that are none of a latent space.
    """

    latent_scale: float = LATENT_SCALE
    latent_shift: PerChannel = 0.0
    latent_std: PerChannel = 1.0
    latents: str = "vae"

    def __post_init__(self) -> None:
        if self.latents not in get_args(Latents):
            raise ValueError(f"latents {self.latents!r} is none of {', '.join(map(repr, get_args(Latents)))}")
        for name in ("latent_scale", "latent_shift", "latent_std"):
            value = getattr(self, name)
            per_channel = isinstance(value, list | tuple) and name != "latent_scale"
            lowest = -MAX_NUMBER if name == "latent_shift" else 0.0
            for number in value if per_channel else [value]:
                is_number = isinstance(number, int | float) and not isinstance(number, bool)
                if not is_number or not lowest < number < MAX_NUMBER:
                    raise ValueError(f"{name} is {value!r}, but must be {'above 0' if lowest == 0 else 'a number'}")
            object.__setattr__(self, name, tuple(map(float, value)) if per_channel else float(value))
        if self.is_pixels and (self.latent_scale, self.latent_shift, self.latent_std) != (1, 0, 1):
            raise ValueError(
                "latents are 'pixels', which have no latent_scale but 1, no latent_shift and no latent_std"
            )

    @property
    def is_pixels(self) -> bool:
        """Whether x_0 are images themselves, without a VAE."""
        return self.latents == "pixels"

    @classmethod
    def recorded(cls, content: Mapping[str, Any]) -> Self:
        """What a file or a config records. What it lacks, or has as null, is the default: no shift, for example."""
        names = [field.name for field in fields(cls)]
        found = {name: content[name] for name in names if content.get(name) is not None}
        return cls(**{"latent_scale": 1.0} | found if found.get("latents") == "pixels" else found)

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
        if self.is_pixels:
            return "pixels"
        values = {"shift": (self.latent_shift, 0), "standard deviation": (self.latent_std, 1)}
        texts = [f"latent scale {self.latent_scale:g}"]
        for name, (value, none) in values.items():
            if isinstance(value, tuple):
                texts.append(f"{name} ({', '.join(f'{number:g}' for number in value)})")
            elif value != none:
                texts.append(f"{name} {value:g}")
        return ", ".join(texts)


PIXELS = LatentSpace(1.0, latents="pixels")


@dataclass(frozen=True)
class Conventions(LatentSpace):
    """What else must be known of a U-ViT to sample with it. Its config.json has these settings.

    - `timestep_labels`: the timesteps that the network gets, from the least to the most noise: "1..1000" as trained,
      or "0..999" as PaddleMIX passes them.
    - `prediction_type`: what the network predicts, whatever the scheduler expects.
    - `path`: how x_0 becomes noise, see `uvit.diffusion`.
    """

    timestep_labels: str = "1..1000"
    prediction_type: PredictionType = "epsilon"
    path: DiffusionPath = "vp"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "timestep_labels": tuple(TIMESTEP_OFFSETS),
            "prediction_type": get_args(PredictionType),
            "path": get_args(DiffusionPath),
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, known))}")
        if problem := prediction_problem(self.path, self.prediction_type):
            raise ValueError(f"prediction_type {self.prediction_type!r} {problem}")
        if self.path == "linear" and self.timestep_labels != "1..1000":
            raise ValueError(f"timestep_labels {self.timestep_labels!r} is for path 'vp', and not for 'linear'")


def prediction_problem(path: DiffusionPath, prediction_type: PredictionType) -> str:
    """Why a network cannot predict this on this path, as the end of a sentence; or an empty string."""
    possible = PREDICTION_TYPES[path]
    if prediction_type in possible:
        return ""
    if prediction_type == "epsilon":
        reason = "does not determine x_0 at timestep 1000, which is pure noise"
    else:
        reason = "is defined on other paths"
    return f"{reason}; with path {path}, use {' or '.join(possible)}"


def recorded_conventions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `Conventions` that a U-ViT's config has. A latent scale alone stands for no shift."""
    names = [field.name for field in fields(Conventions) if config.get(field.name) is not None]
    space = asdict(LatentSpace.recorded(config)) if "latent_scale" in names or config.get("latents") == "pixels" else {}
    return space | {name: getattr(Conventions.recorded(config), name) for name in names}


def record_conventions(unet: Any, given: Mapping[str, Any]) -> None:
    """Record the conventions that are given in the U-ViT's config. Raises ValueError where it has others."""
    recorded = recorded_conventions(unet.config)
    given = {key: value for key, value in given.items() if value is not None}
    space = LatentSpace.recorded(given)
    given = {key: getattr(space, key, value) for key, value in given.items()}
    for key, value in given.items():
        if recorded.get(key, value) != value:
            raise ValueError(
                f"{key} is {value!r} here, but {recorded[key]!r} in the U-ViT's own config (unet/config.json, or "
                "unet.config); leave it out, or change it there"
            )
    Conventions.recorded(recorded | given)  # raises ValueError if they contradict each other
    unet.register_to_config(**given)


def _per_channel(value: PerChannel, like: Tensor) -> Tensor | float:
    return like.new_tensor(value).view(-1, 1, 1) if isinstance(value, tuple) else value
