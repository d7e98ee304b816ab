"""Going back to the last checkpoint, to pass over samples on which no update could be made.

`logs/passed_over.jsonl` names them, a line each: `sample` (of the sample counter), `row` of the features, `id` and
`captions` where the features know them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from uvit.checkpoint.folder import read_checkpoint
from uvit.distributed.ops import broadcast
from uvit.errors import UserError
from uvit.io import write_bytes
from uvit.store.reader import FeatureStore
from uvit.store.types import Features
from uvit.train.checkpointing import restore
from uvit.train.guards import SampleRange
from uvit.train.metrics import logs_folder
from uvit.train.setup import Run

MAX_ROLLBACKS = 3  # without an update after the step that failed
MAX_NAMED_SAMPLES = 5  # samples on the console


def roll_back(run: Run) -> None:
    """Put the run where its last good checkpoint was, with the samples of the steps just skipped to pass over.

    Which checkpoint it is makes no difference to what follows, as long as it is from before those steps.
    Raises UserError where there is no checkpoint, or going back did not help before.
    """
    guards = run.guards
    if run.checkpoint is None or guards.num_rollbacks == MAX_ROLLBACKS:
        raise UserError(too_many_skipped(run))
    failed_at, num_rollbacks, before = run.step, guards.num_rollbacks + 1, guards.passed_over
    stretch, num_steps = (guards.skipped_from, run.samples), guards.skipped_in_a_row
    found = read_checkpoint(broadcast(good_checkpoint(run.checkpoint, guards.good), run.world))
    restore(run, found)
    guards.passed_over, guards.failed_at, guards.num_rollbacks = [*before, stretch], failed_at, num_rollbacks
    guards.skipped_in_a_row = 0
    if run.world.is_main:
        samples = samples_of(run, stretch, before)
        path = skipped_samples_file(run)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        named = ", ".join(name_of(sample) for sample in samples[:MAX_NAMED_SAMPLES])
        print(
            f"the loss or gradient was far too large or not finite for {num_steps} steps in a "
            f"row, up to step {failed_at}: going back to {found.folder} and passing over their {len(samples)} "
            f"samples: {named}{', ...' if len(samples) > MAX_NAMED_SAMPLES else ''} (all of them in {path})",
            flush=True,
        )


def good_checkpoint(last: Path, good: str | None) -> Path:
    """The last one itself, where --save_total_limit has deleted the good one before it."""
    if good and (folder := last.with_name(good)).is_dir():
        return folder
    return last


def too_many_skipped(run: Run) -> str:
    count, last = run.guards.skipped_in_a_row, run.checkpoint
    saved = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    if run.guards.num_rollbacks:
        saved += f", and going back {run.guards.num_rollbacks} times did not help"
    return (
        f"the loss or gradient was far too large or not finite for {count} steps in a row, up to step {run.step}, and "
        f"nothing was updated; {saved}. Try a lower --learning_rate than {run.config.learning_rate}, --max_grad_norm 1 "
        "or --bf16 instead of --fp16"
    )


def samples_of(run: Run, stretch: SampleRange, passed_over: list[SampleRange]) -> list[dict[str, Any]]:
    """What is known of the samples of a stretch that were not passed over before."""
    counters = np.arange(*stretch)
    for first, end in passed_over:
        counters = counters[(counters < first) | (counters >= end)]
    rows = run.batches.rows(counters)
    known = {int(row): describe_row(run.features, int(row)) for row in np.unique(rows)}  # in the order of the files
    pairs = zip(counters.tolist(), rows.tolist(), strict=True)
    return [{"sample": counter, "row": row} | known[row] for counter, row in pairs]


def describe_row(features: Features, row: int) -> dict[str, Any]:
    known: dict[str, Any] = {"id": features.ids(row)} if isinstance(features, FeatureStore) else {}
    captions = features.captions(row)
    return known | ({"captions": list(captions)} if captions else {})


def name_of(sample: dict[str, Any]) -> str:
    name = f"row {sample['row']}"
    return f"{name} ({sample['id']})" if "id" in sample else name


def skipped_samples_file(run: Run) -> Path:
    return logs_folder(run.config, run.output_dir) / "passed_over.jsonl"


def forget_unskipped(run: Run) -> None:
    """Forget samples that the run, gone on from a checkpoint, does not know of: it will come by them again."""
    path = skipped_samples_file(run)
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if is_skipped(json.loads(line)["sample"], run.guards.passed_over)]
    write_bytes(path, "".join(kept).encode())


def is_skipped(counter: int, passed_over: list[SampleRange]) -> bool:
    return any(first <= counter < end for first, end in passed_over)
