"""Features in memory give the batches that the loader reads from disk."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretend_gpu import pretend_gpus
from tests.real_images import EXAMPLES
from tests.tiny import tiny_vit_folder
from uvit.config.extract import ExtractConfig
from uvit.config.objective import ObjectiveConfig
from uvit.extract.extract import extract
from uvit.store.reader import FeatureStore
from uvit.train.loader import BatchDataset, prefetch
from uvit.train.memory_features import FeaturesInMemory


def assert_same_batches(features: FeatureStore, size: int, tokens: bool, **flags: Any) -> None:
    """To the bit, and in the same order, over the end of an epoch."""
    config = ObjectiveConfig(**flags)
    from_disk, in_memory = (BatchDataset(features, size, 3, use_tokens=tokens, config=config) for _ in range(2))
    in_memory.memory = FeaturesInMemory(features, tokens, config.needs_teacher(), torch.device("cpu"))
    for one, other in zip(
        prefetch(from_disk, range(8), 0, torch.device("cpu")),
        prefetch(in_memory, range(8), 2, torch.device("cpu")),
        strict=True,
    ):
        for field in fields(one):
            ours, theirs = getattr(one, field.name), getattr(other, field.name)
            assert (ours is None) == (theirs is None), field.name
            assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), field.name


@pytest.mark.parametrize("tokens", [False, True])
def test_latents_and_texts(store: Path, tokens: bool) -> None:
    assert_same_batches(FeatureStore(store / "train"), 100, tokens)


@pytest.mark.parametrize("kind", ["mirrored latents", "mirrored pixels", "teacher"])
def test_other_stores_in_several_files(kind: str, encoders: tuple[Path, Path], tmp_path: Path) -> None:
    vae, text_encoder = map(str, encoders)
    extract(
        ExtractConfig(
            source=(str(EXAMPLES),),
            output_dir=str(tmp_path / "store"),
            latents="none" if kind == "mirrored pixels" else "vae",
            vae_name_or_path=None if kind == "mirrored pixels" else vae,
            text_encoder_name_or_path=text_encoder,
            teacher=str(tiny_vit_folder(tmp_path / "vit")) if kind == "teacher" else None,
            random_flip=kind != "teacher",
            shard_size=3,
            resolution=16,
            model_max_length=16,
            num_workers=0,
            disable_tqdm=True,
        )
    )
    flags = {"align": "repa"} if kind == "teacher" else {}
    assert_same_batches(FeatureStore(tmp_path / "store" / "train"), 10, False, **flags)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_gpu_gathers_and_draws_the_same_without_a_wait(store: Path, tokens: bool) -> None:
    features, config = FeatureStore(store / "train"), ObjectiveConfig(noise_device="device", noise_offset=0.1)
    wanted = [BatchDataset(features, 50, 3, use_tokens=tokens, config=config)[i] for i in range(4)]
    with pretend_gpus() as gpus:
        device = torch.device("cuda", 1)
        batches = BatchDataset(features, 50, 3, use_tokens=tokens, config=config)
        batches.memory = FeaturesInMemory(features, tokens, False, device)
        found = prefetch(batches, range(4), 0, device)
        first = next(found)  # makes the table of normal numbers
        gpus.waits.clear()
        rest = list(found)
        assert not gpus.waits
        for one, other in zip([first, *rest], wanted, strict=True):
            for field in fields(one):
                ours, theirs = getattr(one, field.name), getattr(other, field.name)
                assert (ours is None) == (theirs is None), field.name
                assert ours is None or torch.equal(ours.cpu(), theirs), field.name
