"""A tiny feature store with contexts and token ids, made by the real commands, and runs on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder, tiny_vit_folder
from uvit.config.extract import ExtractConfig
from uvit.config.train import TrainConfig
from uvit.extract.extract import extract
from uvit.store.reader import FeatureStore
from uvit.train.loader import BatchDataset

TINY_MODEL = {
    "sample_size": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "clip_dim": 32,
    "num_text_tokens": 16,
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return tiny_vae_folder(folder / "vae", factor=4), tiny_text_encoder_folder(folder / "text", num_tokens=16, width=32)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, encoders: tuple[Path, Path]) -> Path:
    """Pairs of 16x16 pixels, 648 in train/ and 72 in heldout/: latents of 4x4, contexts of 16x32, token ids."""
    folder = tmp_path_factory.mktemp("features") / "store"
    vae, text_encoder = map(str, encoders)
    for split in ("train", "heldout"):
        extract(
            ExtractConfig(
                source=("shapes",),
                split=split,
                output_dir=str(folder),
                vae_name_or_path=vae,
                text_encoder_name_or_path=text_encoder,
                text="both",
                resolution=16,
                model_max_length=16,
                num_workers=0,
                disable_tqdm=True,
            )
        )
    return folder


@pytest.fixture
def edited_store(store: Path, tmp_path: Path) -> Callable[..., str]:
    """A function: fields -> a copy of the store whose manifests say so, all of them or those of one split."""

    def edit(split: str = "*", **fields: Any) -> str:
        copy = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
        shutil.copytree(store, copy)
        for path in copy.glob(f"{split}/manifest.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return str(copy)

    return edit


@pytest.fixture
def token_store(edited_store: Callable[..., str]) -> str:
    """The same without contexts."""
    return edited_store(context_shape=None)


@pytest.fixture
def poisoned_store(edited_store: Callable[..., str]) -> Callable[..., str]:
    """A function: sample counters of a tiny run -> a store in which the moments of those samples are not finite."""

    def poison(*counters: int) -> str:
        copy = edited_store()
        rows = BatchDataset(FeatureStore(Path(copy) / "train"), 4, TrainConfig.seed).rows(np.array(counters))
        moments = np.load(Path(copy) / "train" / "moments-00000.npy", mmap_mode="r+")
        moments[rows] = np.nan
        moments.flush()
        return copy

    return poison


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path


@pytest.fixture
def tiny_config(store: Path, model_file: Path, tmp_path: Path) -> Any:
    """A function: flags -> TrainConfig of a tiny run in tmp_path/run."""

    def config(**flags: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "feature_path": str(store),
            "output_dir": str(tmp_path / "run"),
            "uvit_config_file": str(model_file),
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "warmup_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "image_logging_steps": -1,
            "save_steps": 3,
            "dataloader_num_workers": 0,
            "ema_decay": 0.9,
            "report_to": "none",
            "device": "cpu",
            "disable_tqdm": True,
        }
        return TrainConfig(**(values | flags))

    return config


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_vit_folder(tmp_path_factory.mktemp("networks") / "tiny-vit"))


@pytest.fixture
def evaluated_config(tiny_config: Any, vit: str) -> Any:
    """Evaluated after steps 2, 4 and 6."""
    flags = {
        "eval_metrics": ("fd", "kid"), "feature_extractor": vit, "eval_prompts": 10, "eval_steps": 2,
        "num_inference_steps": 2, "validation_split": "heldout", "num_validation_samples": 8,
    }  # fmt: skip
    return lambda **more: tiny_config(**(flags | more))
