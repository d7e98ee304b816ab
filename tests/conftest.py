"""The property tests draw the same examples each time: a red test stays red until it is fixed. And shared encoders."""

import importlib
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import settings

from tests.port import drawn
from tests.real_images import coco_folder, image_tar
from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder

__all__ = ["coco_folder", "drawn", "image_tar"]  # fixtures

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# A process has one fork server. Started by any test, it has imported what all of them fork processes for.
multiprocessing.set_forkserver_preload(
    [
        "tests.distributed.worker",
        "tests.test_kills",
        "uvit.train.autoencoder",
        "uvit.evaluate.evaluate",
        "uvit.store.merge",
        "tests.frozen",  # the last: it freezes the others
    ]
)


def pytest_collection_finish() -> None:
    importlib.import_module("tests.frozen")  # now that all tests have imported what they need


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae_folder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_encoder_folder(tmp_path_factory.mktemp("text_encoder"))
