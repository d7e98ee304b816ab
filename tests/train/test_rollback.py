"""Samples on which no update can be made are skipped and named, and skipped again by a run that resumes."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_trainer import lines, same
from uvit.checkpoint.averages import list_snapshots
from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.errors import UserError
from uvit.store.reader import FeatureStore
from uvit.train.rollback import MAX_ROLLBACKS, good_checkpoint
from uvit.train.step import train_step
from uvit.train.trainer import train

BAD = range(16, 28)  # the samples of steps 5, 6 and 7


@pytest.fixture
def config(tiny_config: Any, poisoned_store: Callable[..., str]) -> Any:
    """A function: flags -> the config of a run that saves at step 4 and fails at step 7."""
    store = poisoned_store(*BAD)
    flags = {"feature_path": store, "max_nonfinite_steps": 3, "max_steps": 9, "save_steps": 4}
    return lambda **more: tiny_config(**(flags | more))


def test_a_run_rolls_back_and_skips_samples(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config()) == 0
    run = tmp_path / "run"
    assert [line["step"] for line in lines(run)] == list(range(1, 10))  # once each
    assert [line["samples"] for line in lines(run)] == [4, 8, 12, 16, 32, 36, 40, 44, 48]
    assert not any(line["skipped"] for line in lines(run))
    said = capsys.readouterr().out
    assert "not finite for 3 steps in a row, up to step 7: rolled back to" in said and "checkpoint-4. Their 12" in said

    features = FeatureStore(Path(config().feature_path) / "train")
    named = [json.loads(line) for line in (run / "logs" / "passed_over.jsonl").read_text().splitlines()]
    assert [sample["sample"] for sample in named] == list(BAD)
    for sample in named:
        assert features.ids(sample["row"]) == sample["id"]
        assert list(features.captions(sample["row"])) == sample["captions"]
    assert f"row {named[0]['row']} ({named[0]['id']})" in said
    record = read_checkpoint(run / "checkpoint-8").record
    assert record["guards"]["passed_over"] == [[16, 28]] and record["guards"]["good"] == "checkpoint-8"


def test_the_same_run_again_does_the_same(config: Any, tmp_path: Path) -> None:
    """So does one that is stopped amidst the bad steps, or after them, or saves at other steps."""
    ways = {"one": [{}], "stopped": [{"max_steps": n} for n in (5, 6, 9)], "often": [{"save_steps": 1}]}
    ways |= {"workers": [{"dataloader_num_workers": 2}], "later": [{"max_steps": n} for n in (4, 8, 9)]}
    for name, parts in ways.items():
        for flags in parts:
            assert train(config(output_dir=str(tmp_path / name), **flags)) == 0
    for name in ways:
        assert same(tmp_path / "one" / "checkpoint-9", tmp_path / name / "checkpoint-9"), name
        assert lines(tmp_path / "one") == lines(tmp_path / name), name
        logs = (folder / "logs" / "passed_over.jsonl" for folder in (tmp_path / "one", tmp_path / name))
        assert len({path.read_text() for path in logs}) == 1, name


def test_a_host_that_reads_the_numbers_late_does_the_same(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it knows of the bad steps after more of them, and after a good one."""
    assert train(config(output_dir=str(tmp_path / "one"))) == 0
    monkeypatch.setattr("uvit.train.trainer.is_reading", lambda run: run.step in (4, 8, 9))
    assert train(config(output_dir=str(tmp_path / "late"))) == 0
    assert same(tmp_path / "one" / "checkpoint-9", tmp_path / "late" / "checkpoint-9")
    assert lines(tmp_path / "one") == lines(tmp_path / "late")
    records = [read_checkpoint(tmp_path / name / "checkpoint-8").record["guards"] for name in ("one", "late")]
    assert records[0] == records[1]


def test_captions_with_line_separators_of_unicode_do_not_keep_a_run_from_resuming(config: Any, tmp_path: Path) -> None:
    flags = config()
    for path in (Path(flags.feature_path) / "train").glob("captions-*.jsonl"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"red", "\u2028".encode()).replace(b"blue", "\u2029".encode() + b"e"))
        assert data.count(b"red") and path.stat().st_size == len(data)
    assert train(flags) == 0
    log = tmp_path / "run" / "logs" / "passed_over.jsonl"
    before = log.read_bytes()
    assert "\u2028" in before.decode() and train(config(feature_path=flags.feature_path, max_steps=10)) == 0
    assert log.read_bytes() == before


def test_where_the_checkpoint_before_is_gone_the_one_in_the_midst_will_do(config: Any, tmp_path: Path) -> None:
    assert train(config(save_steps=1, max_steps=6)) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert train(config(save_steps=1)) == 0
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert lines(tmp_path / "run")[-1]["samples"] == 40
    assert good_checkpoint(tmp_path / "checkpoint-6", "checkpoint-4") == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-4").mkdir()
    assert good_checkpoint(tmp_path / "checkpoint-6", "checkpoint-4") == tmp_path / "checkpoint-4"


def test_samples_that_a_run_does_not_know_of_are_named_once(config: Any, tmp_path: Path) -> None:
    """After a kill between a rollback and the next checkpoint, the run rolls back once more."""
    train(config())
    run = tmp_path / "run"
    before = (run / "logs" / "passed_over.jsonl").read_text()
    train(config(resume_from_checkpoint=str(run / "checkpoint-4")))
    assert (run / "logs" / "passed_over.jsonl").read_text() == before


def test_without_a_checkpoint_it_ends_with_a_sentence(config: Any, tmp_path: Path) -> None:
    message = r"not finite for 3 steps in a row, up to step 7; .*There is no checkpoint yet\. .*lower --learning_rate"
    with pytest.raises(UserError, match=message):
        train(config(save_steps=100))


def test_rollbacks_that_do_not_help_end_too(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second update ruins the weights, whatever the samples."""
    config = tiny_config(learning_rate=1e30, warmup_steps=1, max_steps=50, max_nonfinite_steps=2)
    with pytest.raises(UserError, match=r"checkpoint-3, and 3 rollbacks did not help.*lower --learning_rate"):
        train(config)
    assert capsys.readouterr().out.count("rolled back to") == MAX_ROLLBACKS
    [last] = checkpoint_folders(tmp_path / "run")
    assert read_checkpoint(last).step == 3


def test_a_stop_after_a_rollback_goes_on_where_it_was(config: Any, tmp_path: Path) -> None:
    """Checkpoints saved amid the bad steps are gone: the stopped run has no later one than its own."""
    often = {"save_steps": 2, "ema_lengths": (0.1,), "ema_snapshot_steps": 2}
    assert train(config(output_dir=str(tmp_path / "one"), **often)) == 0
    assert train(config(max_steps=6, **often)) == 0  # amid them
    run = tmp_path / "run"
    assert [folder.name for folder in checkpoint_folders(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]

    def stop(state: Any, batches: Any) -> Any:
        result = train_step(state, batches)
        if state.step == 5 and state.guards.skipped_samples:
            signal.raise_signal(signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvit.train.trainer.train_step", stop)
        assert train(config(**often)) == 143
    assert [folder.name for folder in checkpoint_folders(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert max(snapshot.step for snapshot in list_snapshots(run)) == 4
    assert train(config(**often)) == 0
    assert same(run / "checkpoint-9", tmp_path / "one" / "checkpoint-9") and lines(run) == lines(tmp_path / "one")
    assert [path.name for path in sorted((run / "ema").iterdir())] == [
        path.name for path in sorted((tmp_path / "one" / "ema").iterdir())
    ]


def test_the_checkpoint_to_roll_back_to_is_not_pruned(config: Any, tmp_path: Path) -> None:
    """Those that are saved amid the bad steps do not take its place."""
    for name, limit in (("all", None), ("one", 1)):
        assert train(config(output_dir=str(tmp_path / name), save_steps=2, save_total_limit=limit)) == 0
    assert same(tmp_path / "all" / "checkpoint-9", tmp_path / "one" / "checkpoint-9")
    assert lines(tmp_path / "all") == lines(tmp_path / "one")
    assert [folder.name for folder in checkpoint_folders(tmp_path / "one")] == ["checkpoint-9"]
