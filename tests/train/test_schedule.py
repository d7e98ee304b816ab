"""What is left of a resumed run, whatever has changed: each sample of an epoch is drawn exactly once."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint
from uvit.config.extract import ExtractConfig
from uvit.extract.extract import extract
from uvit.train.loader import BatchDataset
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


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ends", ENDS)
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
