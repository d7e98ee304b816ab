"""What a feature store records about its origin: the source, the settings and the encoders."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from uvit.config.extract import ExtractConfig
from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.extract.teacher import Teacher
from uvit.extract.tokenizer import train_tokenizer
from uvit.sources.types import RandomAccessSource, Source
from uvit.store.shard import read_record
from uvit.store.writer import INDEX_SHA256, StoreInfo
from uvit.weights.encoders import (
    downsampling_of,
    fingerprint,
    highest_token_id,
    load_tokenizer,
    tokenizer_fingerprint,
)

VOCAB_SIZE = 8192  # of a tokenizer that is trained here without --vocab_size


def describe_store(
    config: ExtractConfig,
    source: Source,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    tokenizer_record: dict[str, str],
    latent_space: LatentSpace,
    teacher: Teacher | None = None,
) -> StoreInfo:
    """All settings that determine the stored features. Batch size, workers and device may change on resuming."""
    side = config.resolution if vae is None else config.resolution // downsampling_of(vae)
    index = source.index_sha256()
    wants_contexts, wants_tokens = config.text != "tokens", config.text != "contexts"
    return StoreInfo(
        num_source_pairs=len(source) if isinstance(source, RandomAccessSource) else None,
        shard_size=config.shard_size,
        dtype=config.dtype,
        moments_shape=None if vae is None else (2 * vae.config["latent_channels"], side, side),
        images_shape=(3, side, side) if vae is None else None,
        flipped=config.random_flip,
        context_shape=(config.model_max_length, text_encoder.config.hidden_size) if wants_contexts else None,
        num_tokens=config.model_max_length,
        token_dtype=("uint16" if highest_token_id(tokenizer) < 2**16 else "int32") if wants_tokens else None,
        **asdict(latent_space),
        split=config.split,
        source={
            "source": [absolute_name(name) for name in config.source],
            "split": config.split,
            "val_every": config.val_every,
            "image_folder": [absolute_name(name) for name in config.image_folder],
            "image_column": config.image_column,
            "caption_column": config.caption_column,
            "resolution": config.resolution,
            "crop": config.crop,
            "resize": config.resize,
            "icc": config.icc,
            "crop_before_resize": True,
            "min_image_size": config.min_image_size,
            "on_error": config.on_error,
            "precision": "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32",
            **({} if index is None else {INDEX_SHA256: index}),
        },
        vae={"name": absolute_name(config.vae_name_or_path or ""), "sha256": fingerprint(vae)} if vae else None,
        text_encoder={
            "name": absolute_name(config.text_encoder_name_or_path or ""),
            "sha256": fingerprint(text_encoder),
        }
        if text_encoder
        else None,
        tokenizer=tokenizer_record,
        teacher=teacher.record if teacher else None,
        teacher_shape=teacher.features_shape if teacher else None,
    )


def find_tokenizer(config: ExtractConfig, source: Source, folder: Path) -> tuple[Any, dict[str, str]]:
    """(tokenizer, its name and fingerprint).

    It is the given one, else the one of a split beside `folder`, else a new one trained on the captions.
    """
    if given := config.tokenizer_name or config.text_encoder_name_or_path:
        tokenizer = load_tokenizer(given)
        return tokenizer, _record(absolute_name(given), tokenizer)
    for split in (folder, folder.with_name("train"), *sorted(folder.parent.glob("*"))):
        if (split / "tokenizer").is_dir() and (split / "settings.json").is_file():
            tokenizer = load_tokenizer(str(split / "tokenizer"))
            if config.vocab_size is not None and config.vocab_size < len(tokenizer):
                raise UserError(
                    f"--vocab_size {config.vocab_size}: {split / 'tokenizer'} has {len(tokenizer)} tokens, and the"
                    " splits of a feature store share a tokenizer; remove --vocab_size, or choose another --output_dir"
                )
            if split != folder:
                print(f"Tokenizer: the one of {split}.")
            return tokenizer, _record(read_record(split / "settings.json")["tokenizer"]["name"], tokenizer)
    tokenizer = train_tokenizer(source.all_captions(), config.vocab_size or VOCAB_SIZE, config.model_max_length)
    sources = ", ".join(absolute_name(name) for name in config.source)
    return tokenizer, _record(f"built from the captions of {sources}", tokenizer)


def scale_reason(config: ExtractConfig, vae: Any, latent_space: LatentSpace) -> str:
    if vae is None:
        return "from --latents none"
    if config.latent_scale:
        return "from --latent_scale"
    stored = vae.config["scaling_factor"]
    if latent_space.latent_scale == stored:
        return "stored with the VAE"
    return f"U-ViT's value for a Stable Diffusion VAE, whose own is {stored:g}"


def _record(name: str, tokenizer: Any) -> dict[str, str]:
    return {"name": name, "sha256": tokenizer_fingerprint(tokenizer)}


def absolute_name(name_or_path: str) -> str:
    """A local file or folder as an absolute path; Hub ids, URLs and built-in names as they are."""
    path = Path(name_or_path)
    return str(path.resolve()) if path.exists() else name_or_path
