from pathlib import Path

import pytest

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae_folder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_encoder_folder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    return _shared("coco_mini")


@pytest.fixture(scope="session")
def emoji_tar() -> Path:
    return _shared("emoji_noto_64.tar")


def _shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the repository, in ../shared/data")
    return SHARED / name
