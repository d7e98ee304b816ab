"""Runs `uvit train` in one world after another: `python -m tests.distributed.training_worker FOLDER`.

Each process lists the samples that it reads in rows.txt: sample counter and row.

A world costs no import: its processes are forked off this one. FOLDER/worlds.json lists them, see `World`.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.soak import TRAIN, make_features, start, wait
from uvit.train.loader import BatchDataset


@dataclass(frozen=True)
class World:
    """A run in a folder of its name, of `degrees` (dp, shard, tp); it goes on with a checkpoint of another run."""

    name: str
    degrees: tuple[int, int, int]
    flags: str = ""
    after: str = ""  # such as one/run/checkpoint-2

    @property
    def size(self) -> int:
        return self.degrees[0] * self.degrees[1] * self.degrees[2]

    def arguments(self, folder: Path) -> list[str]:
        """The same eight samples a step in every layout, two at a time."""
        dp, shard, tp = self.degrees
        flags = f"{TRAIN} --per_device_train_batch_size 2 --gradient_accumulation_steps {4 // (dp * shard)} "
        flags += f"--dp_degree {dp} --sharding_parallel_degree {shard} --tensor_parallel_degree {tp} "
        flags += "--max_steps 10 --save_steps 2 --save_total_limit 9 --warmup_steps 2 "
        return f"{flags} {self.flags}".replace("FOLDER", str(folder)).split()


def run(world: World, folder: Path) -> None:
    here = folder / world.name
    (here / "run").mkdir(parents=True, exist_ok=True)
    if world.after:
        before = folder / world.after
        shutil.copytree(before, here / "run" / before.name)
        shutil.copytree(before.parent / "logs", here / "run" / "logs", dirs_exist_ok=True)
    statuses = wait(start(world.arguments(folder), here, world.size))
    if any(statuses):
        sys.exit(f"{world.name}: {statuses}\n{(here / 'output.txt').read_text()[-5000:]}")


def log_rows() -> None:
    original = BatchDataset.rows

    def rows(self: BatchDataset, counters: np.ndarray) -> np.ndarray:
        found = original(self, counters)
        with Path("rows.txt").open("a") as file:  # in the folder of the world; a short line is written at once
            file.write("".join(f"{counter} {row}\n" for counter, row in zip(counters, found, strict=True)))
        return found

    BatchDataset.rows = rows  # type: ignore[method-assign]


def write_worlds(worlds: list[World], folder: Path) -> None:
    (folder / "worlds.json").write_text(json.dumps([asdict(world) for world in worlds]))


def main() -> None:
    folder = Path(sys.argv[1])
    make_features(folder)
    log_rows()
    for fields in json.loads((folder / "worlds.json").read_text()):
        run(World(**fields), folder)


if __name__ == "__main__":
    main()
