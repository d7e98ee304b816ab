"""One server for all tests of this folder that need no other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sample.parts import tiny_pipeline_folder
from tests.serve.parts import Served, serving


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(pipeline_folder: Path) -> Iterator[Served]:
    with serving(f"tiny={pipeline_folder}") as server:
        yield server
