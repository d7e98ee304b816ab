"""Validation: the loss on pairs that are not trained on, with the same pairs, noise and timesteps in every run.

So runs and steps compare, and nothing of a run's own draws is used up.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uvit.data.features import Features
from uvit.data.loader import permute
from uvit.data.types import Batch
from uvit.diffusion import NUM_TIMESTEPS
from uvit.distributed.mesh import World
from uvit.distributed.ops import mean_over_data
from uvit.train.setup import Run
from uvit.train.step import context_of, loss_of

NUM_PARTS = 8
PART = NUM_TIMESTEPS // NUM_PARTS
TIMESTEPS = tuple(range(PART // 2 + 1, NUM_TIMESTEPS, PART))  # labels 63, 188, ..., 938: the middles of equal parts
VALIDATION = 5  # a stream of random numbers of its own


def is_due(run: Run) -> bool:
    return run.validation is not None and (run.step % run.config.eval_steps == 0 or run.step == run.max_steps)


def validate(run: Run) -> dict[str, Any]:
    """For metrics.jsonl, None where not finite.

    `val_losses`, one a timestep, and their mean `val_loss` are the averaged weights', where there are any;
    `val_loss_raw` is of the weights that are trained.
    """
    raw = losses(run, run.precision.networks)
    averaged = losses(run, run.ema.model) if run.ema else raw
    return {
        "val_loss": _finite(float(np.mean(averaged))),
        "val_loss_raw": _finite(float(np.mean(raw))),
        "val_losses": [_finite(value) for value in averaged],
    }


@torch.no_grad()
def losses(run: Run, networks: nn.Module) -> list[float]:
    """Mean squared error at each of TIMESTEPS, in the run's prediction type and without weights."""
    features = run.validation
    assert features is not None
    rows = validation_rows(features.num_samples, run.config.num_validation_samples)
    totals = torch.zeros(NUM_PARTS, dtype=torch.float64, device=run.device)
    training = networks.training
    networks.eval()
    for mine, here in shares(rows, run.config.per_device_train_batch_size, run.world):
        batch, noise = read_batch(features, here, run.batches.use_tokens)
        batch, noise = batch.to(run.device), noise.to(run.device)
        with run.precision.autocast():
            batch = replace(batch, context=context_of(run, networks, batch))  # once for all timesteps
        for i, timestep in enumerate(TIMESTEPS):
            noised = replace(batch, noise=noise[:, i], timesteps=torch.full_like(batch.timesteps, timestep))
            value = loss_of(run, networks, noised)
            if mine:
                totals[i] += value * len(here)
    networks.train(training)
    totals = mean_over_data(totals, run.world) * run.world.num_data_ranks
    return (totals / len(rows)).tolist()


def shares(rows: np.ndarray, batch_size: int, world: World) -> Iterator[tuple[bool, np.ndarray]]:
    """This process's batches of rows, and whether they count: all must run the networks equally often."""
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for first in range(0, len(parts), world.num_data_ranks):
        index = first + world.data_rank
        yield index < len(parts), parts[min(index, len(parts) - 1)]


def validation_rows(num_samples: int, wanted: int) -> np.ndarray:
    """The first of a fixed permutation."""
    return permute(np.arange(min(num_samples, wanted)), num_samples, seed=0, epoch=0)


def read_batch(features: Features, rows: np.ndarray, use_tokens: bool) -> tuple[Batch, Tensor]:
    """(batch, noise for each timestep (B, 8, C, h, w)): first captions, none dropped, no image mirrored."""
    channels, height, width = features.moments_shape
    shape = (1 + NUM_PARTS, channels // 2, height, width)
    read = features.read(rows, np.zeros(len(rows)))
    # A stretch of the stream for each row: its noise depends on neither the batch nor the run's seed.
    streams = [np.random.Philox(key=[0, VALIDATION], counter=[0, 0, 0, row]) for row in rows.tolist()]
    drawn = np.stack([np.random.Generator(bits).standard_normal(shape, dtype=np.float32) for bits in streams])
    noise = torch.from_numpy(drawn)
    batch = Batch(
        moments=torch.from_numpy(read.moments),
        context=None if use_tokens else torch.from_numpy(read.context),
        token_ids=torch.from_numpy(read.token_ids.astype(np.int64)) if use_tokens else None,  # type: ignore[union-attr]
        posterior_noise=noise[:, 0],
        noise=noise[:, 1],
        timesteps=torch.zeros(len(rows), dtype=torch.int64),
    )
    return batch, noise[:, 1:]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
