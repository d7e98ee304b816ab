"""`--keep_best`: which checkpoint is the best one. OUTPUT_DIR/best.json names it, and pruning spares it.

Each checkpoint records the best one up to its own step. After a resume or a rollback, a run compares with that one.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvit.checkpoint.folder import BEST
from uvit.distributed.ops import broadcast, on_main
from uvit.errors import UserError
from uvit.io import write_json
from uvit.train.evaluation import Evaluation
from uvit.train.setup import Run


@dataclass(frozen=True)
class Tracked:
    """The score of --keep_best."""

    name: str  # in metrics.jsonl
    better: str  # "lower" or "higher"


def tracked_score(run: Run, evaluation: Evaluation | None) -> Tracked | None:
    """What --keep_best names: val_loss, a metric, or one of its scores, of which the network may be left out."""
    name = run.config.keep_best
    if name is None:
        return None
    if name == "val_loss":
        if run.validation is None:
            raise UserError(
                "--keep_best val_loss: there is nothing to validate on; name a split with --validation_split, or "
                "features with --validation_feature_path"
            )
        return Tracked(name, "lower")
    scores = evaluation.scores if evaluation else {}
    every = {score: better for found in scores.values() for score, better in found.items()}
    matching = [score for score in every if score == name or score.startswith(f"{name}-")]
    if not matching and len(scores.get(name, {})) == 1:  # fid of other weights is called otherwise
        matching = list(scores[name])
    if len(matching) != 1:
        names = [*(["val_loss"] if run.validation is not None else []), *every]
        raise UserError(f"--keep_best {name}: is not a score of this run; choose one of {', '.join(names)}")
    return Tracked(f"eval_{matching[0]}", every[matching[0]])


def settle_best(run: Run, tracked: Tracked | None) -> None:
    """After the start, a resume or a rollback: forget a best checkpoint that is gone, or the best of another metric."""
    best = run.best
    if best and tracked and best["metric"] != tracked.name:
        best = None
    if best and not on_main(functools.partial(Path.is_dir, run.output_dir / best["checkpoint"]), run.world):
        best = None
    run.best = best
    path = run.output_dir / BEST
    on_main(lambda: write_json(path, best) if best else path.unlink(missing_ok=True), run.world)


def new_best(run: Run, tracked: Tracked | None, record: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of best.json if this step is better than all before, or else None; the same in all processes."""
    if tracked is None or tracked.name not in record:
        return None
    value, found = record[tracked.name], None
    sign = 1 if tracked.better == "higher" else -1
    if value is not None and not math.isnan(value) and (run.best is None or sign * value > sign * run.best["value"]):
        found = {
            "metric": tracked.name, "value": value, "step": run.step, "checkpoint": f"checkpoint-{run.step}",
        }  # fmt: skip
    return broadcast(found, run.world)
