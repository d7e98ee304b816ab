"""What is left of a resumed run, whatever has changed: each sample of an epoch is drawn exactly once."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.train.test_trainer import lines, same
from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.config.extract import ExtractConfig
from uvit.config.train import TrainConfig
from uvit.extract.extract import extract
from uvit.train.loader import BatchDataset
from uvit.train.setup import build_run
from uvit.train.trainer import train

DATA = 10  # samples, at first


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory, encoders: tuple[Path, Path]) -> Callable[[int], str]:
    """A function: number of samples -> a store. The first samples of all of them are the same."""
    folder = tmp_path_factory.mktemp("stores")

    def store(size: int) -> str:
        images, output = folder / f"images{size}", folder / f"store{size}"
        if not output.exists():
            images.mkdir()
            for i in range(size):
                Image.new("RGB", (16, 16), (10 * i, 20, 30)).save(images / f"{i:02}.png")
                (images / f"{i:02}.txt").write_text("a red circle")
            vae, text_encoder = map(str, encoders)
            extract(
                ExtractConfig(
                    source=(str(images),),
                    output_dir=str(output),
                    vae_name_or_path=vae,
                    text_encoder_name_or_path=text_encoder,
                    resolution=16,
                    model_max_length=16,
                    num_workers=0,
                    disable_tqdm=True,
                )
            )
        return str(output)

    return store


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(sample counter, row) of each sample that is drawn in this test."""
    found: list[tuple[int, int]] = []
    original = BatchDataset.rows

    def rows(self: BatchDataset, counters: np.ndarray) -> np.ndarray:
        result = original(self, counters)
        found.extend(zip(counters.tolist(), result.tolist(), strict=True))
        return result

    monkeypatch.setattr(BatchDataset, "rows", rows)
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def samples(run: Path) -> int:
    return read_checkpoint(checkpoint_folders(run)[-1]).record["samples"]


# (per_device_train_batch_size, gradient_accumulation_steps) of three starts
BATCHES = [((4, 1), (2, 4), (3, 1)), ((4, 2), (3, 1), (2, 1)), ((3, 1), (1, 3), (12, 2))]
ENDS = {
    "epochs": [{"num_train_epochs": value} for value in (0.7, 1.5, 3.0)],
    "steps": [{"max_steps": value} for value in (2, 5, 9)],
    "epochs, then steps": [{"num_train_epochs": 0.7}, {"max_steps": 5}, {"num_train_epochs": 4.0}],
    "killed": [{"num_train_epochs": 3.0}] * 3,
}
SIZES = {"same": (10, 10, 10), "more": (10, 14, 14), "more twice": (10, 12, 14)}


# Each end with each of the sizes and with each of the batches; not all three together.
SQUARE = [(end, size, BATCHES[(i + j) % 3]) for i, end in enumerate(ENDS) for j, size in enumerate(SIZES)]


@pytest.mark.parametrize(("ends", "sizes", "batches"), SQUARE, ids=str)
def test_each_sample_of_an_epoch_is_drawn_once_whatever_changes(
    ends: str,
    sizes: str,
    batches: tuple[tuple[int, int], ...],
    tiny_config: Any,
    stores: Callable[[int], str],
    drawn: list[tuple[int, int]],
    tmp_path: Path,
) -> None:
    run, step = tmp_path / "run", 0
    for i, (size, (batch, accumulation), end) in enumerate(zip(SIZES[sizes], batches, ENDS[ends], strict=True)):
        config = tiny_config(
            feature_path=stores(size), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            save_steps=1, **end,
        )  # fmt: skip
        before = samples(run) if i else 0
        assert train(config) == 0
        if ends == "killed" and i < 2:  # after two steps, if there are as many
            for folder in checkpoint_folders(run)[step + 2 :]:
                folder.rename(tmp_path / f"{i}-{folder.name}")
            step = len(checkpoint_folders(run))
            drawn[:] = [each for each in drawn if each[0] < samples(run)]
            continue
        step = len(checkpoint_folders(run))
        if "max_steps" in end:
            assert step == end["max_steps"]
        elif sizes == "same":
            wanted = math.ceil(end["num_train_epochs"] * DATA)
            assert max(wanted, before) <= samples(run) < max(wanted + batch * accumulation, before + 1)

    assert [counter for counter, _ in drawn] == list(range(samples(run)))  # once each, in order
    assert [line["step"] for line in metrics(run)] == list(range(1, step + 1))
    assert [folder.name for folder in checkpoint_folders(run)] == [f"checkpoint-{i}" for i in range(1, step + 1)]
    rows, sizes_left = [row for _, row in drawn], sorted(set(SIZES[sizes]))
    while rows:
        complete = [size for size in sizes_left if set(rows[:size]) == set(range(size))]
        length = max(complete, default=len(rows))
        assert complete or len(set(rows)) == len(rows) < max(sizes_left), rows  # the last epoch may be a part
        rows, sizes_left = rows[length:], [size for size in sizes_left if size >= length]


def test_after_a_rollback_skipped_samples_count_as_passed(
    tiny_config: Any, poisoned_store: Callable[..., str], tmp_path: Path
) -> None:
    flags = {"feature_path": poisoned_store(*range(20, 28)), "max_nonfinite_steps": 2, "num_train_epochs": 40 / 648}
    flags |= {"save_steps": 1, "lr_scheduler_type": "linear", "output_dir": str(tmp_path / "whole")}
    assert train(tiny_config(**flags)) == 0
    whole = lines(tmp_path / "whole")
    assert [line["samples"] for line in whole] == [4, 8, 12, 16, 20, 32, 36, 40]
    for step in range(1, 8):  # killed after it, and run again
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", folder)
        for later in checkpoint_folders(folder)[step:]:
            shutil.rmtree(later)
        assert train(tiny_config(**flags | {"output_dir": str(folder)})) == 0
        assert lines(folder) == whole and same(folder / "checkpoint-8", tmp_path / "whole" / "checkpoint-8")


def test_going_back_with_another_batch_and_more_data_counts_from_there(
    tiny_config: Any, stores: Callable[[int], str], drawn: list[tuple[int, int]], tmp_path: Path, capsys: Any
) -> None:
    run, flags = tmp_path / "run", {"num_train_epochs": 2.0, "save_steps": 1}
    assert train(tiny_config(feature_path=stores(10), **flags)) == 0
    first = drawn.copy()
    back = flags | {"resume_from_checkpoint": "checkpoint-1", "per_device_train_batch_size": 3}
    for start in ("the first", "repeated"):
        drawn.clear()
        assert train(tiny_config(feature_path=stores(14), **back)) == 0
        said = capsys.readouterr().out.splitlines()
        if start == "the first":
            index = said.index(f"what a later branch left is now in {run / 'set-aside-1'}")
            assert said[index + 1 : index + 3] == [
                f"resumed {run}/checkpoint-1: step 1 of 8 (4 samples, 0.4 epochs); left until --num_train_epochs 2: "
                "7 steps of 3 samples, 1.671 epochs",
                "the data had 10 samples and now has 14: epochs of the new size begin at sample 10",
            ]
            assert [counter for counter, _ in drawn] == list(range(4, 25)) and drawn[:6] == first[4:10]
            assert {row for counter, row in drawn if 10 <= counter < 24} == set(range(14))
    assert drawn == [] and f"{run}: all 8 steps are done (25 samples, 2.071 epochs)" in said
    record = read_checkpoint(run / "checkpoint-8").record
    assert (record["resumed_from"], record["epochs"]) == ("checkpoint-1", [[0, 0, 10], [10, 1, 14]])


def said(capsys: pytest.CaptureFixture[str], *beginnings: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(beginnings)]


def test_a_resumed_run_says_what_is_left_and_of_what(
    tiny_config: Any, stores: Callable[[int], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(size: int, **flags: Any) -> list[str]:
        assert train(tiny_config(feature_path=stores(size), **flags)) == 0
        found = said(capsys, "resumed", "a step had", "the data had", str(tmp_path / "run:"))
        return [line.replace(f"{tmp_path}/", "") for line in found if "already exists" not in line]

    assert run(10, num_train_epochs=1.2) == []
    assert run(10, num_train_epochs=1.2) == [
        "resumed run/checkpoint-3: step 3 of 3 (12 samples, 1.2 epochs); left until --num_train_epochs 1.2: "
        "0 steps of 4 samples, 0 epochs",
        "run: all 3 steps are done (12 samples, 1.2 epochs)",
    ]
    assert run(14, num_train_epochs=3, per_device_train_batch_size=6) == [
        "resumed run/checkpoint-3: step 3 of 7 (12 samples, 1.2 epochs); left until --num_train_epochs 3: "
        "4 steps of 6 samples, 1.943 epochs",
        "the data had 10 samples and now has 14: epochs of the new size begin at sample 20",
    ]
    assert run(7, max_steps=9, gradient_accumulation_steps=2) == [
        "resumed run/checkpoint-7: step 7 of 9 (36 samples, 3.143 epochs); left until --max_steps 9: "
        "2 steps of 8 samples, 2.286 epochs",
        "a step had 6 samples and now has 8: --max_steps counts steps of both, so the run ends after 52 samples; it "
        "would have ended after 48, which --max_steps 9 gives",
        "the data had 14 samples and now has 7: epochs of the new size begin at sample 36",
    ]
    assert run(7, max_steps=5)[-1] == "run: all 9 steps are done (52 samples, 6.286 epochs)"


def test_the_learning_rate_goes_on_where_it_was_with_another_batch(tiny_config: Any, tmp_path: Path) -> None:
    flags = {"lr_scheduler_type": "linear", "warmup_steps": 2, "num_train_epochs": 0.5, "save_steps": 1}  # 324 samples
    assert train(tiny_config(output_dir=str(tmp_path / "whole"), **flags)) == 0
    whole = metrics(tmp_path / "whole")
    assert len(whole) == 81
    for folder in checkpoint_folders(tmp_path / "whole"):
        if int(folder.name[11:]) != 40:
            folder.rename(tmp_path / folder.name)
    assert train(tiny_config(output_dir=str(tmp_path / "whole"), **flags, per_device_train_batch_size=12)) == 0
    changed = metrics(tmp_path / "whole")
    assert len(changed) == 40 + math.ceil((324 - 160) / 12) and changed[:40] == whole[:40]
    # In steps of 12 the run would have 27, and 2 of warm-up. 14 are left.
    assert [line["lr"] for line in changed[40:]] == pytest.approx([1e-3 * left / 25 for left in range(14, 0, -1)])
    assert changed[40]["lr"] == pytest.approx(whole[40]["lr"], rel=0.1)  # the warm-up had fewer samples


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"warmup_steps": 400}, [r"_steps: .* 400 steps, and the run has 300; .* at most 0\.000748 of .* 0\.001"]),
        ({"warmup_steps": 300}, ["at most 0.000997 of"]),
        ({"warmup_steps": 299}, []),
        ({"warmup_steps": 9, "max_steps": 1}, ["at most 0 of", "too early for --save_steps 3", "ema_decay 0.9"]),
        ({"warmup_steps": 9999, "lr_scheduler_type": "constant"}, []),
        ({"warmup_steps": 0, "warmup_ratio": 0.999}, ["--warmup_ratio: the warm-up takes 300 steps"]),
        ({"save_steps": 301}, [r"ends at step 300, too early for --save_steps 301 \(no checkpoint before"]),
        ({"save_steps": 300, "logging_steps": 300, "image_logging_steps": 300}, []),
        ({"logging_steps": 400, "image_logging_steps": 400}, [r"--logging_steps 400 \(.*--image_logging_steps 400"]),
        ({"eval_steps": 999}, ["--eval_steps 999: there is nothing to validate on"]),
        ({"eval_steps": 999, "validation_split": "heldout"}, [r"--eval_steps 999 \(validation only at the end\)"]),
        ({"max_nonfinite_steps": 301}, [r"--max_nonfinite_steps 301 \(no rollback\)"]),
        ({"per_device_train_batch_size": 648}, []),
        ({"per_device_train_batch_size": 325, "gradient_accumulation_steps": 2}, ["650 samples, .* data has 648"]),
        ({"ema_decay": 0.999}, [r"over 1,000 steps, .* 300; in the end .* 74\.1% .* --ema_decay 0\.9667"]),
        ({"ema_decay": 0.999, "use_ema": False}, []),
        ({"ema_update_steps": 301}, [r"--ema_update_steps 301 \(the EMA weights.* stay the initial"]),
        ({"ema_update_steps": 301, "use_ema": False}, []),
        ({"num_train_epochs": 2.0, "max_steps": 5}, ["--max_steps 5: is not used, .*_epochs 2 .* 324"]),
        ({"lr_scheduler_type": "polynomial", "power": 9.0}, ["is below 0.001 of its peak after step"]),
        ({"lr_scheduler_type": "cosine"}, []),
        ({"lr_scheduler_type": "linear", "min_lr": 1e-4}, []),
        ({"lr_scheduler_type": "cosine", "num_cycles": 1.0}, ["--num_cycles: .* at its lowest, .* ends at 0.001"]),
        ({"lr_scheduler_type": "cosine", "num_cycles": 1.5}, []),
        ({"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 3.0}, []),
        ({"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 1.5}, ["--num_cycles"]),
        ({"profiler_options": "10,299"}, []),
        ({"profiler_options": "10,161", "num_train_epochs": 1.0, "max_steps": 1_000_000}, []),
        (
            {"profiler_options": "10,162", "num_train_epochs": 1.0, "max_steps": 1_000_000},
            ["--profiler_options 10,162: no trace .* only 162 steps are left"],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_schedule_cannot_do_is_said_in_a_dry_run(
    flags: dict[str, Any], expected: list[str], tiny_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_config(**({"max_steps": 300, "dry_run": True} | flags))) == 0
    found = said(capsys, "warning: ")
    assert len(found) == len(expected), found
    for text in expected:
        assert any(re.search(text, line) for line in found), (text, found)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"max_steps": TrainConfig.max_steps}, 10_000),  # the published decay, 0.9999, for the published million
        ({"max_steps": 200_000}, 10_000),
        ({"max_steps": 1000}, 50),
        ({"max_steps": 7}, 1),  # the weights themselves
        ({"num_train_epochs": 5}, 40.5),  # 810 steps
        ({"num_train_epochs": 5, "per_device_train_batch_size": 8}, 20.25),
        ({"max_steps": 1000, "ema_decay": 0.99}, 100),
    ],
)
def test_the_average_is_as_long_as_the_run_allows(flags: dict[str, Any], steps: float, tiny_config: Any) -> None:
    run = build_run(tiny_config(**({"ema_decay": None} | flags)), Path("unused"))
    assert 1 / (1 - run.ema.decay) == pytest.approx(steps)


def test_it_is_said_before_the_first_step_too(tiny_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"save_steps": 7, "latent_scale": 4.5}
    assert train(tiny_config(**flags, dry_run=True)) == 0
    planned = said(capsys, "warning: ")
    assert train(tiny_config(**flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == planned
    assert max(lines.index(line) for line in planned) < min(i for i, line in enumerate(lines) if line[:5] == "step ")
    assert train(tiny_config(**flags)) == 0  # all is done
    assert said(capsys, "warning: ") == []
