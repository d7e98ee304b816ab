"""Pictures of a run while it trains: fixed captions and noise, drawn by the averaged weights."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from uvit.convert.export import check_fingerprint
from uvit.convert.folder import load_vae_of_any
from uvit.convert.place import place_of
from uvit.data.encoders import decode_latents
from uvit.errors import UserError
from uvit.images import contact_sheet, save_png, to_pil
from uvit.sample.denoise import denoise
from uvit.sample.schedulers import build_scheduler
from uvit.train.setup import Run
from uvit.train.step import encode_text

GUIDANCE_SCALES = (1.0, 7.5)
MAX_IMAGES = 8
PREVIEWS = 4  # a stream of random numbers of its own


def load_preview_vae(run: Run) -> AutoencoderKL | None:
    """The VAE for the previews, or None where none are asked for, or none can be had and none was named.

    Raises UserError where one was named and is not the one that made the features.
    """
    config = run.config
    if config.image_logging_steps <= 0:
        return None
    named = place_of("vqvae", config.pretrained_model_name_or_path, config.vae_name_or_path)
    try:
        if not (named or run.features.vae_name):
            raise UserError("the features do not say which VAE made them; pass --vae_name_or_path")
        name = named or run.features.vae_name or ""
        vae = load_vae_of_any(name)
        check_fingerprint(vae, run.features.vae_sha256, "vae_name_or_path", name)
        return vae.to(run.device)
    except UserError as error:
        if named:
            raise
        print(f"no previews: {error}")
        return None


@torch.no_grad()
def preview(run: Run, vae: AutoencoderKL) -> Image.Image:
    """Rows: the pictures themselves through the VAE, then guidance 1.0 and 7.5. Saved in previews/ too."""
    rows = np.arange(min(MAX_IMAGES, run.features.num_samples))
    read = run.features.read(rows, np.zeros(len(rows)))
    unet = run.averaged["unet"]
    if run.batches.use_tokens:
        ids = np.concatenate([read.token_ids, run.features.empty_token_ids[None]]).astype(np.int64)  # type: ignore[index]
        contexts = encode_text(run, run.averaged, torch.from_numpy(ids).to(run.device))
    else:
        stored = np.concatenate([read.context, run.features.empty_context[None]])  # type: ignore[index]
        contexts = torch.from_numpy(stored).to(run.device).float()
    context, empty_context = contexts[:-1], contexts[-1:]
    means = torch.from_numpy(read.moments).to(run.device).float().chunk(2, dim=1)[0]
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, PREVIEWS]))
    noise = torch.from_numpy(generator.standard_normal(means.shape, dtype=np.float32)).to(run.device)

    images = to_pil(decode_latents(vae, means * run.latent_scale, run.latent_scale))
    for guidance_scale in GUIDANCE_SCALES:
        latents = denoise(
            unet,
            build_scheduler("dpmsolver++"),
            noise,
            context,
            empty_context,
            guidance_scale=guidance_scale,
            num_inference_steps=run.config.num_inference_steps,
            prediction_type=run.config.prediction_type,
        )
        images += to_pil(decode_latents(vae, latents, run.latent_scale))
    captions = [run.features.captions(int(row)) for row in rows]
    labels = [texts[0] if texts else "" for texts in captions]
    labels += [f"guidance {scale}" for scale in GUIDANCE_SCALES for _ in rows]
    sheet = contact_sheet(images, labels, columns=len(rows), cell=max(64, images[0].width))
    if run.world.is_main:
        save_png(sheet, run.output_dir / "previews" / f"step-{run.step:08d}.png")
    return sheet
