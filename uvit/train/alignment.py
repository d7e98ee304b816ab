"""Alignment: a projector predicts more of the image than its noise from the tokens of an early block.

The projector is trained along with the U-ViT and saved in checkpoints, but it is no part of the pipeline. Its targets
are the patches of x_0 (SRA 2). The tokens are taken by a hook, so the model knows nothing of it.
"""

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.model import UViTT2IModel

SRA_BETA = 0.05  # errors below it count squared, those above it linearly


class Projector(nn.Module):
    """Predicts targets (B, E, h, w) from the image tokens of a block of width D, and measures its error."""

    def __init__(self, width: int, num_targets: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_targets))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            tokens: (B, L, D), all of the block's. The last h w are of the image.
            targets: (B, E, h, w).
        """
        targets = targets.flatten(2).transpose(1, 2)  # (B, h w, E)
        predicted = self.layers(tokens[:, -targets.shape[1] :])
        return F.smooth_l1_loss(predicted.float(), targets.float(), beta=SRA_BETA)


def is_aligning(config: TrainConfig, step: int, max_steps: int) -> bool:
    """Whether optimizer step `step`, counted from 0, has an alignment loss."""
    if config.align == "none" or config.align_until is None:
        return config.align != "none"
    until = config.align_until
    return step < (until if until >= 1 else round(until * max_steps))


def build_projector(config: TrainConfig, unet: UViTT2IModel) -> Projector:
    """Raises UserError if the U-ViT has no such block."""
    num_blocks = len(blocks_in_order(unet))
    if config.align_block > num_blocks:
        raise UserError(f"--align_block {config.align_block}: the model has {num_blocks} blocks; choose an earlier one")
    if config.compile:
        raise UserError("--compile: compiled blocks do not hand out the tokens that --align needs; choose one of them")
    return Projector(unet.norm.weight.shape[0], unet.patch_size**2 * unet.config.in_channels)


def blocks_in_order(unet: UViTT2IModel) -> list[nn.Module]:
    return [*unet.in_blocks, unet.mid_block, *unet.out_blocks]


@contextlib.contextmanager
def recorded_tokens(unet: UViTT2IModel, block: int) -> Iterator[list[Tensor]]:
    """A list that gets the output (B, L, D) of a block, counted from 1, at each forward pass in the context."""
    outputs: list[Tensor] = []
    hook = blocks_in_order(unet)[block - 1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()  # a block that is recomputed in the backward pass is not recorded again


def alignment_targets(unet: UViTT2IModel, x_0: Tensor) -> Tensor:
    """x_0 (B, C, H, W) -> its patches (B, C p p, h, w)."""
    p = unet.patch_size
    return F.unfold(x_0, p, stride=p).unflatten(2, (x_0.shape[2] // p, x_0.shape[3] // p))
