"""`--features_in_memory`: whether the features of a run are kept in memory, and whether they fit."""

import os
from pathlib import Path

import torch

from uvit.distributed.ops import on_main
from uvit.errors import UserError
from uvit.io import format_bytes
from uvit.store.reader import FeatureStore
from uvit.train.dry_run import build_meta_run, plan_of_run
from uvit.train.memory_features import FeaturesInMemory, needed_arrays
from uvit.train.setup import Run

SPARE = 0.1  # of a memory: what is not planned for


def place_features(run: Run) -> str | None:
    """Load the features into the memory that --features_in_memory names. Returns what to say of it.

    Raises UserError, in all processes, if they do not fit there.
    """
    device, said = on_main(lambda: choose_memory(run), run.world)  # other processes may have begun to fill it
    if device is not None:
        assert isinstance(run.features, FeatureStore)
        target = run.device if device == "device" else torch.device("cpu")
        run.batches.memory = FeaturesInMemory(run.features, run.batches.use_tokens, run.config.needs_teacher(), target)
    return said


def choose_memory(run: Run) -> tuple[str | None, str | None]:
    """-> (device, host or None: the features stay on disk; what to say of it)."""
    config, store, device = run.config, run.features, run.device
    wanted = config.features_in_memory
    if wanted == "none" or (wanted == "auto" and (device.type != "cuda" or not isinstance(store, FeatureStore))):
        return None, None
    flag = f"--features_in_memory {wanted}"
    if not isinstance(store, FeatureStore):
        raise UserError(f"{flag}: needs a feature store; make one of .npy features with `uvit features import`")
    if wanted == "device" and device.type == "cpu":
        raise UserError(f"{flag}: the device is the CPU; use host")
    arrays = needed_arrays(store, run.batches.use_tokens, config.needs_teacher())
    num_bytes = sum(array.nbytes for array in arrays.values())
    if wanted == "host":
        where, limit = "the main memory", available_bytes()
        needed = num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process has its own
    else:
        where, limit = "the GPU's memory", torch.cuda.get_device_properties(device).total_memory
        needed = num_bytes + sum(plan_of_run(build_meta_run(config)).memory.values())
    if needed > (1 - SPARE) * limit:
        sentence = (
            f"the features have {format_bytes(num_bytes)}; with them, the run needs {format_bytes(needed)} of "
            f"{where}, of which there are {format_bytes(limit)}, and a tenth is to be left"
        )
        if wanted == "auto":
            return None, f"features are read from disk: {sentence}"
        raise UserError(f"{flag}: {sentence}; use none, or store token ids instead of text embeddings")
    return "host" if wanted == "host" else "device", f"features are in {where}: {format_bytes(num_bytes)}"


def available_bytes() -> int:
    """Of the main memory: what programs can still use, where the system tells, or else all of it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
