"""Worlds of two and of four processes, spawned once for all the tests of this folder."""

import fcntl
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import start_processes

from tests.distributed.worker import CASES, run, train
from uvit.distributed.mesh import Degrees, World, init_distributed

OF_TWO = {
    "2x1x1": ["plain", "all", "muon"],
    "1x2x1": ["plain", "all", "copy", "modern", "muon"],
    "1x1x2": ["plain", "all", "bf16", "modern", "muon"],
}
OF_FOUR = {"2x1x2": ["all"], "1x2x2": ["all", "modern", "muon"], "2x2x1": ["all"]}


@dataclass(frozen=True)
class Worlds:
    """What the processes of spawned worlds found."""

    folder: Path

    def trained(self, layout: str, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{layout}-{case}.safetensors")

    def checks(self, layout: str) -> list[dict[str, Any]]:
        """By rank."""
        size = Degrees(*map(int, layout.split("x"))).product
        return [json.loads((self.folder / f"{layout}-{rank}.json").read_text()) for rank in range(size)]


def spawn(folder: Path, size: int, layouts: dict[str, list[str]]) -> None:
    """Run a world to its end; raises with the traceback of the first process that fails, and ends the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A server that has imported everything forks the processes: imports are most of the time otherwise.
    start_processes(run, (size, port, folder, layouts), nprocs=size, start_method="forkserver")


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Spawned once, too, where several processes run the tests: they share the parent of their own folders."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "worlds"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            spawn(folder, 2, OF_TWO)
            spawn(folder, 4, OF_FOUR)
            (folder / "done").touch()
    return Worlds(folder)


@pytest.fixture(scope="session")
def alone() -> World:
    return init_distributed(Degrees(), "cpu")


@pytest.fixture(scope="session")
def trained_alone(alone: World) -> Callable[[str], dict[str, Tensor]]:
    """The same training in one process, by case."""
    return cache(lambda case: train(alone, **CASES[case]))  # type: ignore[arg-type]
