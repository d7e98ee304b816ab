"""The validation loss, on pairs that are not trained on.

All runs use the same pairs, noise and timesteps, so that their losses compare. It uses up none of a run's own random
numbers.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uvit.diffusion import NUM_TIMESTEPS
from uvit.distributed.mesh import World
from uvit.distributed.ops import mean_over_data
from uvit.store.types import Features
from uvit.train.loader import Batch, permute, to_tensor
from uvit.train.noise import Stream
from uvit.train.setup import Run
from uvit.train.step import batch_context, compute_losses

NUM_VALIDATION_TIMESTEPS = 8
SPACING = NUM_TIMESTEPS // NUM_VALIDATION_TIMESTEPS
TIMESTEPS = tuple(range(SPACING // 2 + 1, NUM_TIMESTEPS, SPACING))  # 63, 188, ..., 938: the middles of equal intervals


def validation_is_due(run: Run) -> bool:
    """Whether to validate and evaluate after this step."""
    return run.config.eval_steps != -1 and (run.step % run.config.eval_steps == 0 or run.step == run.max_steps)


def validate(run: Run) -> dict[str, Any]:
    """The values for metrics.jsonl, None if not finite.

    `val_losses`, one for each timestep, and their mean `val_loss` are of the EMA model, if there is one. `val_loss_raw`
    is of the raw weights.
    """
    raw = losses(run, run.precision.compute_model)
    ema = losses(run, run.ema.model) if run.ema else raw
    return {
        "val_loss": _finite(float(np.mean(ema))),
        "val_loss_raw": _finite(float(np.mean(raw))),
        "val_losses": [_finite(value) for value in ema],
    }


@torch.no_grad()
def losses(run: Run, model: nn.Module) -> list[float]:
    """The unweighted mean squared error at each of TIMESTEPS."""
    features = run.validation
    assert features is not None
    rows = validation_rows(features.num_samples, run.config.num_validation_samples)
    totals = torch.zeros(NUM_VALIDATION_TIMESTEPS, dtype=torch.float64, device=run.device)
    training = model.training
    model.eval()
    size = equal_batch_size(len(rows), run.config.per_device_train_batch_size)
    with uncompiled(run):
        for counts, batch_rows in local_batches(rows, size, run.world):
            batch, noise = read_batch(features, np.resize(batch_rows, size), run.batches.use_tokens)  # rows again: full
            batch, noise = batch.to(run.device), noise.to(run.device)
            with run.precision.autocast():
                batch = replace(batch, context=batch_context(run, model, batch))  # once for all timesteps
            for i, timestep in enumerate(TIMESTEPS):
                noised = replace(batch, noise=noise[:, i], timesteps=torch.full_like(batch.timesteps, timestep))
                values = compute_losses(run, model, noised)
                if counts:
                    totals[i] += values[: len(batch_rows)].double().sum()
    model.train(training)
    totals = mean_over_data(totals, run.world) * run.world.num_data_ranks
    return (totals / len(rows)).tolist()


def equal_batch_size(num_rows: int, batch_size: int) -> int:
    """As many batches as `batch_size` makes, and as few rows in each as they need to be equally large."""
    return math.ceil(num_rows / math.ceil(num_rows / batch_size))


def uncompiled(run: Run) -> contextlib.AbstractContextManager[object]:
    """Run the network as it is, not as it is compiled: for batches of training alone, and with gradients."""
    return torch.compiler.set_stance("force_eager") if run.config.compile else contextlib.nullcontext()


def local_batches(rows: np.ndarray, batch_size: int, world: World) -> Iterator[tuple[bool, np.ndarray]]:
    """This process's batches: (whether it counts, its rows). All processes get equally many, as collectives demand."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for first in range(0, len(batches), world.num_data_ranks):
        index = first + world.data_rank
        yield index < len(batches), batches[min(index, len(batches) - 1)]


def validation_rows(num_samples: int, wanted: int) -> np.ndarray:
    """The first rows of a fixed permutation."""
    return permute(np.arange(min(num_samples, wanted)), num_samples, seed=0, epoch=0)


def read_batch(features: Features, rows: np.ndarray, use_tokens: bool) -> tuple[Batch, Tensor]:
    """(batch, noise for each timestep (B, 8, C, h, w)). First captions; none is dropped, no image is flipped."""
    num_posterior = 0 if features.is_pixels else 1
    shape = (num_posterior + NUM_VALIDATION_TIMESTEPS, *features.latents_shape)
    read = features.read(rows, np.zeros(len(rows)))
    # Each row has its own part of the stream, so its noise depends on neither the batch nor the run's seed.
    streams = [np.random.Philox(key=[0, Stream.VALIDATION], counter=[0, 0, 0, row]) for row in rows.tolist()]
    normal = [np.random.Generator(stream).standard_normal(shape, dtype=np.float32) for stream in streams]
    noise = torch.from_numpy(np.stack(normal))
    batch = Batch(
        moments=to_tensor(read.moments),
        images=to_tensor(read.images),
        context=None if use_tokens else to_tensor(read.context),
        token_ids=torch.from_numpy(read.token_ids.astype(np.int64)) if use_tokens else None,  # type: ignore[union-attr]
        posterior_noise=noise[:, 0] if num_posterior else None,
        noise=noise[:, num_posterior],
        timesteps=torch.zeros(len(rows), dtype=torch.int64),
    )
    return batch, noise[:, num_posterior:]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
