"""Return to the last good checkpoint, and skip the samples of the steps that failed.

The skipped samples are listed in `logs/passed_over.jsonl`, one on each line: `sample` (the sample counter), `row` (of
the features), and `id` and `captions` if the features have them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from uvit.checkpoint.averages import delete_snapshots_after
from uvit.checkpoint.folder import delete_after
from uvit.distributed.ops import broadcast, on_main
from uvit.errors import UserError
from uvit.io import write_bytes
from uvit.store.reader import FeatureStore
from uvit.store.types import Features
from uvit.train.branch import read_together
from uvit.train.checkpointing import restore
from uvit.train.guards import SampleRange
from uvit.train.metrics import logs_folder
from uvit.train.setup import Run, plan_steps

MAX_ROLLBACKS = 3  # without an update after the step that failed
MAX_NAMED_SAMPLES = 5  # on the console


def roll_back(run: Run) -> None:
    """Restore the last good checkpoint, and skip the samples of the steps that were just skipped.

    Any checkpoint from before those steps leads to the same run. Later ones, which were saved amid those steps, and
    later EMA snapshots are deleted: a resume must not begin after the restored step.
    Raises UserError if there is no checkpoint, or if rolling back has not helped before.
    """
    guards = run.guards
    if run.checkpoint is None or guards.num_rollbacks == MAX_ROLLBACKS:
        raise UserError(too_many_skipped(run))
    failed_at, num_rollbacks, skipped_before = run.step, guards.num_rollbacks + 1, guards.skipped_samples
    sample_range, num_steps = (guards.skipped_from, run.samples), guards.skipped_in_a_row
    folder = broadcast(good_checkpoint(run.checkpoint, guards.last_good_checkpoint), run.world)
    restore(run, read_together(folder, run.world))
    guards.skipped_samples = [*skipped_before, sample_range]
    guards.failed_at, guards.num_rollbacks = failed_at, num_rollbacks
    guards.skipped_in_a_row = 0
    plan_steps(run)

    def delete_and_list() -> list[dict[str, Any]]:
        delete_after(run.output_dir, run.step)
        delete_snapshots_after(run.output_dir, run.step)
        samples = describe_samples(run, sample_range, skipped_before)
        with skipped_samples_file(run).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        return samples

    samples = on_main(delete_and_list, run.world)
    named = ", ".join(sample_name(sample) for sample in samples[:MAX_NAMED_SAMPLES])
    print(
        f"the loss or gradient was too large or not finite for {num_steps} steps in a row, up to step {failed_at}: "
        f"rolled back to {folder}. Their {len(samples)} samples are skipped from now on: {named}"
        f"{', ...' if len(samples) > MAX_NAMED_SAMPLES else ''} (all are listed in {skipped_samples_file(run)})",
        flush=True,
    )


def good_checkpoint(last: Path, good: str | None) -> Path:
    """`good`, or the last one if somebody has deleted that."""
    if good and (folder := last.with_name(good)).is_dir():
        return folder
    return last


def too_many_skipped(run: Run) -> str:
    count, last = run.guards.skipped_in_a_row, run.checkpoint
    saved = f"The last checkpoint is {last}" if last else "There is no checkpoint yet"
    if run.guards.num_rollbacks:
        saved += f", and {run.guards.num_rollbacks} rollbacks did not help"
    return (
        f"the loss or gradient was too large or not finite for {count} steps in a row, up to step {run.step}; these "
        f"steps were skipped. {saved}. Try a lower --learning_rate than {run.config.learning_rate}, --max_grad_norm 1 "
        "or --bf16 instead of --fp16"
    )


def describe_samples(run: Run, sample_range: SampleRange, skipped_before: list[SampleRange]) -> list[dict[str, Any]]:
    """What is known of the samples of a range, without those that had been skipped before."""
    counters = np.arange(*sample_range)
    for first, end in skipped_before:
        counters = counters[(counters < first) | (counters >= end)]
    rows = run.batches.rows(counters)
    known = {int(row): describe_row(run.features, int(row)) for row in np.unique(rows)}  # in the order of the files
    pairs = zip(counters.tolist(), rows.tolist(), strict=True)
    return [{"sample": counter, "row": row} | known[row] for counter, row in pairs]


def describe_row(features: Features, row: int) -> dict[str, Any]:
    known: dict[str, Any] = {"id": features.ids(row)} if isinstance(features, FeatureStore) else {}
    captions = features.captions(row)
    return known | ({"captions": list(captions)} if captions else {})


def sample_name(sample: dict[str, Any]) -> str:
    name = f"row {sample['row']}"
    return f"{name} ({sample['id']})" if "id" in sample else name


def skipped_samples_file(run: Run) -> Path:
    return logs_folder(run.config, run.output_dir) / "passed_over.jsonl"


def truncate_skipped_samples(run: Run) -> None:
    """Remove samples from the list that a resumed run has not skipped yet. It will add them again."""
    path = skipped_samples_file(run)
    if not path.exists():
        return
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    kept = [line for line in lines if is_skipped(json.loads(line)["sample"], run.guards.skipped_samples)]
    write_bytes(path, b"".join(kept))


def is_skipped(counter: int, skipped_samples: list[SampleRange]) -> bool:
    return any(first <= counter < end for first, end in skipped_samples)
