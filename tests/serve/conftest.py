"""One server for all tests of this folder that need no other: a pipeline, and a run without one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sample.parts import tiny_pipeline_folder
from tests.serve.parts import Served, serving

OLD = Path(__file__).parents[1] / "fixtures" / "v0.1"


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished run: checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(OLD / "run", folder, ignore=shutil.ignore_patterns("pipeline"))
    return folder


@pytest.fixture(scope="session")
def served(pipeline_folder: Path, run_folder: Path) -> Iterator[Served]:
    with contextlib.chdir(OLD), serving(f"tiny={pipeline_folder}", f"run={run_folder}") as server:
        yield server
