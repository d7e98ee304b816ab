"""`uvit convert`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a checkpoint into a pipeline folder, which `uvit sample` and UViTPipeline.from_pretrained open."""

    source: str
    """The checkpoint-N folder."""
    dest: str
    """The pipeline folder to write."""
    use_ema: bool = True
    """Take the averaged weights, as previews do; False: the raw ones."""
    vae_name_or_path: str | None = None
    """The VAE to put into it; without it the one that the run knew."""
    text_encoder_name_or_path: str | None = None
    """The text encoder to put into it; without it the one that the run trained or knew."""
    tokenizer_name: str | None = None
    """The tokenizer to put into it; without it the one that the run knew."""
    overwrite: bool = False
    """Replace DEST if it is there; the old one is kept under another name."""
