"""Previews: images of the EMA model for the captions of the first training samples, from fixed noise.

They use up none of a run's own random numbers.
"""

import numpy as np
import torch
from PIL import Image

from uvit.distributed.ops import any_of, on_main
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil, to_unit
from uvit.train.noise import Stream
from uvit.train.sampling import Decoder, load_decoder, sample_images, text_embeddings, with_empty_caption
from uvit.train.setup import Run
from uvit.weights.detect import first_that_has

GUIDANCE_SCALES = (1.0, 7.5)
MAX_IMAGES = 8  # in a row


def load_preview_decoder(run: Run) -> Decoder | None:
    """None: previews are turned off, or no flag names a VAE and that of the features cannot be loaded.

    Raises UserError if a flag names a VAE that cannot be loaded or did not make the features.
    """
    config = run.config
    if config.image_logging_steps <= 0:
        return None
    decoder = None
    try:
        decoder = load_decoder(run)
    except UserError as error:
        if first_that_has("vqvae", config.pretrained_model_name_or_path, config.vae_name_or_path):
            raise
        print(f"no previews: {error}")
    if any_of(decoder is None, run.world):  # the processes sample together, and one may not find the VAE's folder
        if decoder is not None:
            print("no previews: another process cannot load the VAE")
        return None
    return decoder


@torch.no_grad()
def preview_sheet(run: Run, decode: Decoder) -> Image.Image:
    """Rows: training images as the VAE decodes them, samples with guidance 1.0 and with 7.5. Also saved in previews/.

    Without a VAE, the training images are those that are stored.
    """
    rows = np.arange(min(MAX_IMAGES, run.features.num_samples))
    read = run.features.read(rows, np.zeros(len(rows)))
    contexts = text_embeddings(run, with_empty_caption(run.features, read, run.batches.use_tokens))
    stored = torch.from_numpy(read.latents()).to(run.device)
    x_0 = to_unit(stored) if run.features.is_pixels else run.conventions.normalize(stored.float())
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, Stream.PREVIEW]))
    noise = torch.from_numpy(generator.standard_normal(x_0.shape, dtype=np.float32)).to(run.device)

    images = to_pil(decode(x_0))
    for guidance_scale in GUIDANCE_SCALES:
        images += to_pil(sample_images(run, decode, noise, contexts, guidance_scale))
    captions = [run.features.captions(int(row)) for row in rows]
    labels = [texts[0] if texts else "" for texts in captions]
    labels += [f"guidance {scale}" for scale in GUIDANCE_SCALES for _ in rows]
    sheet = contact_sheet(images, labels, columns=len(rows), cell=max(64, images[0].width))
    on_main(lambda: save_png(sheet, run.output_dir / "previews" / f"step-{run.step:08d}.png"), run.world)
    return sheet
