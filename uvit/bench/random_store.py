"""A feature store of random numbers, for measurements."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from uvit.conventions import LATENT_SCALE, PIXELS, LatentSpace
from uvit.model import UViTT2IModel
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreInfo, StoreWriter


def write_random_store(folder: Path, unet: UViTT2IModel, num_pairs: int, block: int = 64, pixels: bool = False) -> Path:
    """Write float16 moments, or with `pixels` images, and one context per pair, as the split train.

    Their shapes are those of the model. They repeat after `block` pairs.
    """
    sizes: Any = unet.config
    rows, columns = unet.grid
    num_tokens, width = sizes.num_text_tokens, sizes.clip_dim
    side = (rows * unet.patch_size, columns * unet.patch_size)
    info = StoreInfo(
        num_source_pairs=num_pairs,
        shard_size=num_pairs,
        dtype="float16",
        moments_shape=None if pixels else (2 * sizes.in_channels, *side),
        images_shape=(3, *side) if pixels else None,
        flipped=False,
        context_shape=(num_tokens, width),
        num_tokens=num_tokens,
        token_dtype=None,
        **asdict(PIXELS if pixels else LatentSpace(LATENT_SCALE)),
        split="train",
        source={"source": "random numbers"},
        vae=None if pixels else {"name": "none", "sha256": ""},
        text_encoder=None,
        tokenizer=None,
    )
    random = np.random.default_rng(0)
    moments = images = None
    if pixels:
        images = random.integers(0, 256, (block, 3, *side), dtype=np.uint8)
    else:
        values = random.standard_normal((block, 2 * sizes.in_channels, *side), dtype=np.float32)
        values[:, : sizes.in_channels] /= LATENT_SCALE  # means of a realistic size
        moments = values.astype(np.float16)
    contexts = random.standard_normal((block, num_tokens, width), dtype=np.float32).astype(np.float16)
    writer = StoreWriter(folder / "train", info)
    with writer.open_shard(0) as shard:
        for start in range(0, num_pairs, block):
            size = min(block, num_pairs - start)
            ids = [str(i) for i in range(start, start + size)]
            part = EncodedPairs(
                ids,
                [("",)] * size,
                None if moments is None else moments[:size],
                None,
                contexts[:size],
                None,
                images=None if images is None else images[:size],
            )
            shard.append(part, next_row=start + size)
        shard.finish()
    writer.finish(contexts[0], None)
    return folder
