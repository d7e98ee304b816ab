"""Sampling from a run's EMA model: each image from its own text, and from the empty caption with guidance alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uvit.train.sampling import load_decoder, sample_images, text_embeddings, with_empty_caption
from uvit.train.setup import build_run


@pytest.mark.parametrize("text", ["stored", "trained", "frozen"])
def test_each_image_from_its_own_text(text: str, tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    flags = {"stored": {}, "trained": {"train_text_encoder": True}, "frozen": {"feature_path": token_store}}[text]
    run = build_run(tiny_config(num_inference_steps=2, **flags), tmp_path)
    for parameter in run.ema_model["unet"].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decode, rows = load_decoder(run), np.arange(3)
    contexts = text_embeddings(
        run, with_empty_caption(run.features, run.features.read(rows, np.zeros(3)), text != "stored")
    )
    assert len(contexts) == 4
    if text == "stored":
        assert run.features.empty_context is not None
        torch.testing.assert_close(contexts[3], torch.from_numpy(run.features.empty_context).float(), rtol=0, atol=0)
    noise = torch.randn(3, *run.features.latents_shape, generator=torch.Generator().manual_seed(0))
    images = sample_images(run, decode, noise, contexts, 3.0)
    for row in rows:
        alone = sample_images(run, decode, noise[row, None], contexts[[row, 3]], 3.0)
        torch.testing.assert_close(alone[0], images[row], rtol=0, atol=1e-4)  # rounding of another batch size
    swapped = sample_images(run, decode, noise, contexts[[0, 2, 1, 3]], 3.0)
    assert torch.equal(swapped[0], images[0])
    assert not torch.allclose(swapped[1:], images[1:], atol=1e-3)
    other_empty = torch.cat([contexts[:3], contexts[:1]])
    assert torch.equal(*(sample_images(run, decode, noise, each, 1.0) for each in (contexts, other_empty)))
    assert not torch.allclose(sample_images(run, decode, noise, other_empty, 3.0), images, atol=1e-3)
