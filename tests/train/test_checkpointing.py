"""What is saved has been looked at, and is gone on from only by the run that it belongs to.

Replicas that differ take two processes: they train on replicas, pass over what is bad, and are then made to differ.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_trainer import lines
from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.errors import UserError
from uvit.io import write_yaml
from uvit.train.checkpointing import Checkpointer, resume, run_state
from uvit.train.loader import prefetch
from uvit.train.setup import Run, build_run
from uvit.train.step import train_step
from uvit.train.trainer import train


@pytest.fixture
def run(tiny_config: Any, tmp_path: Path) -> Run:
    run = build_run(tiny_config(), tmp_path / "run")
    run.step = 2  # past the warm-up
    return run


def step(run: Run) -> None:
    train_step(run, prefetch(run.batches, range(run.step, run.step + 1), 0, run.device))


def test_weights_that_move_without_their_average_are_not_saved(run: Run) -> None:
    assert run.ema is not None
    with Checkpointer(run) as saving:
        step(run)
        saving.save()
        run.ema.decay = 1.0
        step(run)
        with pytest.raises(
            UserError, match=r"checkpoint-4 is not written: .*last checkpoint is .*checkpoint-3\. .*too"
        ):
            saving.save()
    assert [folder.name for folder in checkpoint_folders(run.output_dir)] == ["checkpoint-3"]


def test_an_average_may_rest_where_the_weights_do(run: Run) -> None:
    assert run.ema is not None
    run.ema.decay = 1.0
    with Checkpointer(run) as saving:
        saving.save()  # nothing has moved
        step(run)
        run.master_model.load_state_dict(run.ema.model.state_dict())
        saving.save()


def test_an_average_may_rest_until_its_next_update(tiny_config: Any, tmp_path: Path) -> None:
    assert train(tiny_config(ema_update_steps=4, save_steps=1)) == 0
    assert len(checkpoint_folders(tmp_path / "run")) == 6


@pytest.mark.parametrize("decay", [0.9999, 0.0])
def test_a_slow_average_moves_enough(decay: float, tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(
        learning_rate=1e-6, ema_decay=decay, save_steps=1, warmup_steps=3
    )  # the first update has rate 0
    assert train(config) == 0
    assert len(checkpoint_folders(tmp_path / "run")) == 6


def test_a_run_that_was_killed_before_it_pruned_prunes_when_it_resumes(tiny_config: Any, tmp_path: Path) -> None:
    assert train(tiny_config(save_steps=1)) == 0
    assert train(tiny_config(save_steps=1, save_total_limit=2)) == 0  # has nothing left to train or to save
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_is_begun_once_a_step(run: Run) -> None:
    with Checkpointer(run) as saving:
        step(run)
        saving.save()
        written = saving.save_and_wait()
        folder = saving.saved()
        assert folder == run.checkpoint == run.output_dir / "checkpoint-3" and 0 <= written < 60
        first = folder.stat().st_ino
        saving.save_and_wait()
        assert folder.stat().st_ino == first and saving.saved() is None


def test_a_step_changes_nothing_that_is_saved_before_it_has_waited_for_the_copy(run: Run) -> None:
    """AdamW's moments, the weights and their average: they are copied during the forward and the backward pass."""

    def state() -> list[torch.Tensor]:
        return [tensor.clone() for tensors in run_state(run).values() for tensor in tensors.values()]

    def wait() -> None:
        saving.saver.wait_for_copy()
        seen.append(state())

    with Checkpointer(run) as saving:
        step(run)
        saving.save()
        before, seen = state(), list[list[torch.Tensor]]()
        run.before_update = wait
        step(run)
    (waited,) = seen
    assert all(map(torch.equal, before, waited)) and not all(map(torch.equal, before, state()))


def test_which_checkpoint_is_good(run: Run) -> None:
    with Checkpointer(run) as saving:
        for name, skipped in {"checkpoint-3": 0, "checkpoint-4": 1, "checkpoint-5": 0}.items():
            run.step, run.guards.skipped_in_a_row = int(name[-1]), skipped
            saving.save()
    good = [read_checkpoint(folder).record["guards"]["good"] for folder in checkpoint_folders(run.output_dir)]
    assert good == ["checkpoint-3", "checkpoint-3", "checkpoint-5"]


def test_a_checkpoint_keeps_the_norms_to_the_bit(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config())
    norms = read_checkpoint(tmp_path / "run" / "checkpoint-6").record["guards"]["norms"]
    assert norms == [line["grad_norm"] for line in lines(tmp_path / "run")] and len(norms) == 6


def test_other_timestep_labels_are_refused(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(max_steps=3))
    path = tmp_path / "run" / "checkpoint-3" / "uvit.json"
    record = json.loads(path.read_text())
    assert record["timestep_labels"] == "1..1000"
    path.write_text(json.dumps(record | {"timestep_labels": "0..999", "record_sha256": ""}))
    with pytest.raises(
        UserError,
        match=r"another model, precision, optimizer or EMA; .*\n  timestep_labels: was 0\.\.999, now 1\.\.1000",
    ):
        train(tiny_config())


def test_replicas_pass_over_alike_and_are_not_saved_where_they_differ(
    tiny_config: Any, poisoned_store: Callable[..., str], tmp_path: Path
) -> None:
    store = poisoned_store(
        *range(17, 19), *range(20, 28)
    )  # of step 5 half a batch of each process, steps 6 and 7 whole
    flags = {"feature_path": store, "max_nonfinite_steps": 3, "max_steps": 9, "save_steps": 4}
    assert train(tiny_config(output_dir=str(tmp_path / "alone"), **flags)) == 0
    config = tiny_config(output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, dp_degree=2, **flags)
    write_yaml(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.train.two_processes", str(tmp_path / "config.yaml"), str(tmp_path / "apart")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr

    alone, two = lines(tmp_path / "alone"), lines(tmp_path / "two")
    for one, other in zip(alone, two, strict=True):
        assert (one["step"], one["samples"], one["skipped"]) == (other["step"], other["samples"], other["skipped"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    named = [(folder / "logs" / "passed_over.jsonl").read_text() for folder in (tmp_path / "alone", tmp_path / "two")]
    assert named[0] == named[1] and named[0].count("\n") == 12
    assert [folder.name for folder in checkpoint_folders(tmp_path / "apart")] == ["checkpoint-1"]
    for rank in range(2):
        said = (tmp_path / "apart" / f"said-{rank}").read_text()
        assert "checkpoint-2 is not written" in said and "the last checkpoint is" in said and "checkpoint-1" in said
        assert "processes hold different values of weights/unet.pos_embed (1 of " in said


def test_going_on_is_the_same_in_memory_as_it_was(tiny_config: Any, tmp_path: Path) -> None:

    train(tiny_config(max_steps=3))
    run = build_run(tiny_config(), tmp_path / "run")
    resume(run)
    assert (run.step, run.samples, run.checkpoint) == (3, 12, tmp_path / "run" / "checkpoint-3")
    found = read_checkpoint(tmp_path / "run" / "checkpoint-3")
    for group, tensors in run_state(run).items():
        saved = found.load(group)
        assert all(torch.equal(tensors[name], saved[name]) for name in saved) and tensors.keys() == saved.keys()
