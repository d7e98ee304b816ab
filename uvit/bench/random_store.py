"""A feature store of random numbers, for measurements."""

from pathlib import Path
from typing import Any

import numpy as np

from uvit.conventions import LATENT_SCALE
from uvit.model import UViTT2IModel
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreInfo, StoreWriter


def write_random_store(folder: Path, unet: UViTT2IModel, num_pairs: int, block: int = 64) -> Path:
    """Write float16 moments and one context per pair, in the shapes of the model, as the split train.

    They repeat after `block` pairs.
    """
    sizes: Any = unet.config
    rows, columns = unet.grid
    num_tokens, width = sizes.num_text_tokens, sizes.clip_dim
    info = StoreInfo(
        num_source_pairs=num_pairs,
        shard_size=num_pairs,
        dtype="float16",
        moments_shape=(2 * sizes.in_channels, rows * unet.patch_size, columns * unet.patch_size),
        flipped=False,
        context_shape=(num_tokens, width),
        num_tokens=num_tokens,
        token_dtype=None,
        latent_scale=LATENT_SCALE,
        split="train",
        source={"source": "random numbers"},
        vae={"name": "none", "sha256": ""},
        text_encoder=None,
        tokenizer=None,
    )
    random = np.random.default_rng(0)
    moments = random.standard_normal((block, *info.moments_shape), dtype=np.float32)
    moments[:, : sizes.in_channels] /= LATENT_SCALE  # means of a realistic size
    moments = moments.astype(np.float16)
    contexts = random.standard_normal((block, num_tokens, width), dtype=np.float32).astype(np.float16)
    writer = StoreWriter(folder / "train", info)
    with writer.open_shard(0) as shard:
        for start in range(0, num_pairs, block):
            size = min(block, num_pairs - start)
            ids = [str(i) for i in range(start, start + size)]
            part = EncodedPairs(ids, [("",)] * size, moments[:size], None, contexts[:size], None)
            shard.append(part, next_row=start + size)
        shard.finish()
    writer.finish(contexts[0], None)
    return folder
