"""Alignment: a projector predicts more of the image than its noise from the tokens of an early block.

The projector is trained along with the U-ViT and saved in checkpoints, but it is no part of the pipeline. Its targets
are the patches of x_0 (SRA 2), or the features of a teacher (REPA, Yu et al. 2024; iREPA, Singh et al. 2025). The
tokens are taken by a hook, so the model knows nothing of it.

Shapes: B images, L tokens of width D, the last h w of them of the image, E numbers to predict for each of these.
"""

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.model import UViTT2IModel, blocks_in_order
from uvit.store.types import Features

SRA_BETA = 0.05  # errors below it count squared, those above it linearly
SMALLEST_STD = 1e-6


class Projector(nn.Module):
    """Predicts targets from image tokens, and measures its error. `kind`: an --align."""

    def __init__(self, kind: str, width: int, num_targets: int):
        super().__init__()
        self.kind, self.num_targets = kind, num_targets
        if kind == "irepa":
            self.layers: nn.Module = nn.Conv2d(width, num_targets, 3, padding=1)
        else:
            self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_targets))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss, a float32 scalar: smooth L1, or 1 minus the cosine of the angle between features.

        Args:
            tokens: (B, L, D), the output of a block.
            targets: (B, E, h, w).
        """
        _, _, h, w = targets.shape
        tokens = tokens[:, -h * w :]
        if self.kind == "irepa":
            predicted = self.layers(tokens.transpose(1, 2).unflatten(2, (h, w)))  # (B, E, h, w)
        else:
            predicted = self.layers(tokens).transpose(1, 2).unflatten(2, (h, w))  # (B, E, h, w)
        predicted, targets = predicted.float(), targets.float()
        if self.kind == "sra":
            return F.smooth_l1_loss(predicted, targets, beta=SRA_BETA)
        return 1 - F.cosine_similarity(predicted, targets, dim=1).mean()


def is_aligning(config: TrainConfig, step: int, max_steps: int) -> bool:
    """Whether optimizer step `step`, counted from 0, has an alignment loss."""
    if config.align == "none" or config.align_until is None:
        return config.align != "none"
    until = config.align_until
    return step < (until if until >= 1 else round(until * max_steps))


def build_projector(config: TrainConfig, unet: UViTT2IModel, features: Features) -> Projector:
    """Raises UserError if the U-ViT has no such block, or the features no teacher that is needed."""
    num_blocks = len(blocks_in_order(unet))
    if config.align_block > num_blocks:
        raise UserError(f"--align_block {config.align_block}: the model has {num_blocks} blocks; choose an earlier one")
    if config.compile:
        raise UserError("--compile: compiled blocks do not hand out the tokens that --align needs; choose one of them")
    num_targets = unet.patch_size**2 * unet.config.in_channels
    if config.needs_teacher():
        if features.teacher_shape is None:
            raise UserError(
                f"--align {config.align}: --feature_path {config.feature_path} has no features of a teacher; extract "
                "it with --teacher, or choose --align sra"
            )
        num_targets = features.teacher_shape[0]
    return Projector(config.align, unet.norm.weight.shape[0], num_targets)


@contextlib.contextmanager
def recorded_tokens(unet: UViTT2IModel, block: int) -> Iterator[list[Tensor]]:
    """A list that gets the output (B, L, D) of a block, counted from 1, at each forward pass in the context."""
    outputs: list[Tensor] = []
    hook = blocks_in_order(unet)[block - 1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()  # a block that is recomputed in the backward pass is not recorded again


def alignment_targets(kind: str, unet: UViTT2IModel, x_0: Tensor, teacher: Tensor | None = None) -> Tensor:
    """What is predicted from each image token, (B, E, h, w).

    Args:
        x_0: (B, C, H, W).
        teacher: (B, E, h', w'), its features; resampled where its grid is not that of the tokens.
    """
    p = unet.patch_size
    grid = (x_0.shape[2] // p, x_0.shape[3] // p)
    if kind == "sra":
        return F.unfold(x_0, p, stride=p).unflatten(2, grid)
    assert teacher is not None
    features = teacher.float()
    if features.shape[2:] != grid:
        features = F.interpolate(features, grid, mode="bilinear", antialias=True)
    if kind == "irepa":  # what is the same all over the image says nothing of where things are
        deviation = features - features.mean((2, 3), keepdim=True)
        features = deviation / (features.std((2, 3), correction=0, keepdim=True) + SMALLEST_STD)
    return features


def empty_targets(unet: UViTT2IModel, projector: Projector, x_0: Tensor) -> Tensor:
    """Targets that have a shape and no content."""
    p = unet.patch_size
    return x_0.new_empty(len(x_0), projector.num_targets, x_0.shape[2] // p, x_0.shape[3] // p)
