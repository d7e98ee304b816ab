"""Real captioned images, which lie beside the repository."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def _shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the repository, in ../shared/data")
    return SHARED / name


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    return _shared("coco_mini")


@pytest.fixture(scope="session")
def emoji_tar() -> Path:
    return _shared("emoji_noto_64.tar")
