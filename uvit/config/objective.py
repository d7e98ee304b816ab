"""Flags of `uvit train` for the objective: what the network predicts, at which noise, and how its error counts."""

from dataclasses import dataclass
from typing import Annotated, Literal

from uvit.config.bounds import Bounds, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, RealNumber
from uvit.conventions import DiffusionPath, LossType, PredictionType, prediction_problem
from uvit.errors import UserError

JIT_WEIGHT_MAX = 400.0  # 1 / 0.05^2, of Li & He 2025


@dataclass(frozen=True)
class ObjectiveConfig:
    """The diffusion process that is trained. The defaults are U-ViT's."""

    # Objective
    path: DiffusionPath = "vp"
    """How an image becomes noise. vp: as in U-ViT and Stable Diffusion; vp_zero_snr: the same, but its last timestep is
    pure noise; linear: a straight line to pure noise (rectified flow)."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts: the noise, v, the image (sample), or noise minus image (flow_prediction). vp has the
    first three, vp_zero_snr v_prediction and sample, linear sample and flow_prediction."""
    loss_type: LossType = "prediction"
    """The space of the squared error: what is predicted, or the noise, the image (x) or the velocity (v, on a linear
    path the flow) that the prediction stands for."""
    loss_weight_max: PositiveFloat | None = None
    """The error of the image counts 1 with --loss_type x, 1 / s^2 with v and (a / s)^2 with epsilon, where a and s are
    the shares of image and noise; and at most this. Default: no limit, but 400 for a network that predicts the sample
    with a --loss_type of v or epsilon."""
    snr_gamma: PositiveFloat | None = None
    """Weight the loss by min-SNR with this gamma (5 is usual), instead of --loss_type."""
    noise_offset: NonNegativeFloat = 0.0
    """Add this much noise that is constant over each channel, for images darker or brighter than average."""
    noise_device: Literal["host", "device"] = "host"
    """Where the noise of training is drawn. host: by the loader, as in earlier versions. device: by the device that
    trains, other numbers, the same to the bit on GPUs and CPUs; a CPU draws them in a third of the time."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps n are drawn. logit_normal: the noise level n / 1000 is sigmoid(mean + std z) for a normal z, so
    that noise levels in the middle are more frequent."""
    logit_mean: RealNumber = 0.0
    """The mean of logit_normal, of the noise level: above 0, most samples have more noise than image. Where a paper has
    t = 1 at the image, its mean is minus this one."""
    logit_std: PositiveFloat = 1.0
    """The standard deviation of logit_normal."""
    uniform_share: Fraction = 0.0
    """With logit_normal, the share of samples whose timesteps are drawn uniformly all the same. Small data needs some,
    or the noisiest timesteps are never learned."""
    timestep_shift: PositiveFloat = 1.0
    """Move a drawn noise level t to s t / (1 + (s - 1) t): above 1 to more noise, for high resolutions. On a linear
    path, the steps of the solvers move alike."""

    # Alignment
    align: Literal["none", "sra", "repa", "irepa"] = "none"
    """Also predict something of the image from the tokens of an early block, by a small network that is trained along
    and is no part of the pipeline. sra: the patches of the clean latents or pixels (SRA 2); repa: the features of the
    store's --teacher (REPA); irepa: these without their mean over the image, by a convolution (iREPA)."""
    align_weight: PositiveFloat = 0.5
    """How much the alignment loss counts."""
    align_block: PositiveInt = 2
    """The block whose image tokens are aligned, counted from 1."""
    align_until: Annotated[float, Bounds(above=0)] | None = None
    """Align only before this step, or, below 1, in this fraction of all steps (HASTE). Default: to the end."""

    def __post_init__(self) -> None:
        if problem := prediction_problem(self.path, self.prediction_type):
            raise UserError(f"--prediction_type {self.prediction_type}: {problem}")
        if self.snr_gamma is not None and self.loss_type != "prediction":
            raise UserError(f"--snr_gamma {self.snr_gamma:g} and --loss_type {self.loss_type}: choose one weighting")
        if self.loss_weight_max is not None:
            flag = f"--loss_weight_max {self.loss_weight_max:g}"
            if self.snr_gamma is not None:
                raise UserError(f"{flag}: leave it out with --snr_gamma, which is itself the most that an error counts")
            if self.loss_type == "x" or (self.loss_type, self.prediction_type) == ("prediction", "sample"):
                raise UserError(f"{flag}: the error of the image always counts 1 here; use --loss_type v or epsilon")
        if self.timestep_sampling == "uniform":
            for name, default in (("logit_mean", 0.0), ("logit_std", 1.0), ("uniform_share", 0.0)):
                if (value := getattr(self, name)) != default:
                    raise UserError(f"--{name} {value:g}: needs --timestep_sampling logit_normal")
        for name, unused in (("align_weight", 0.5), ("align_block", 2), ("align_until", None)):
            if self.align == "none" and (value := getattr(self, name)) != unused:
                raise UserError(f"--{name} {value:g}: needs --align")
        if self.align_until is not None and self.align_until > 1 and self.align_until % 1:
            raise UserError(f"--align_until {self.align_until:g}: must be a number of steps, or a fraction below 1")

    def whole_timesteps(self) -> bool:
        """Whether all timesteps 1..1000 are equally frequent, as in U-ViT, and no others are drawn."""
        return self.path != "linear" and self.timestep_sampling == "uniform" and self.timestep_shift == 1

    def needs_teacher(self) -> bool:
        """Whether features of a teacher are aligned with."""
        return self.align in ("repa", "irepa")

    def loss_settings(self) -> dict[str, float | str | None]:
        """The arguments of `uvit.diffusion.loss_weight`."""
        weight_max = self.loss_weight_max
        if weight_max is None and self.prediction_type == "sample" and self.loss_type in ("epsilon", "v"):
            weight_max = JIT_WEIGHT_MAX
        return {"snr_gamma": self.snr_gamma, "loss_type": self.loss_type, "loss_weight_max": weight_max}
