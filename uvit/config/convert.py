"""Flags of `uvit convert`."""

from dataclasses import dataclass
from typing import Literal

from uvit.errors import UserError

# The encoders that each format holds beside the U-ViT.
_ALL = ("vae_name_or_path", "text_encoder_name_or_path", "tokenizer_name")
ENCODERS: dict[str, tuple[str, ...]] = {
    "pipeline": _ALL,
    "diffusers": _ALL,
    "port": _ALL,
    "trainer": _ALL[:2],
    "official": _ALL[:1],
    "paddle": (),
    "export": (),
    "onnx": (),
}


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a model from one format into another: a checkpoint into a pipeline, others' weights into ours, and back.

    What SOURCE is, is told by what it holds. A report says what was read, converted, filled in and left out.
    """

    source: str
    """A checkpoint-N folder, a pipeline folder, or weights of the official code or the Paddle port: file or folder."""
    dest: str
    """The folder to write."""
    to: Literal["pipeline", "diffusers", "official", "paddle", "port", "trainer", "export", "onnx"] = "pipeline"
    """The format: ours, ours with its code inside, the official code's .pth files, the U-ViT for the Paddle port, the
    port's pipeline folder or its trainer's checkpoint, or the U-ViT as a graph."""
    weights: Literal["safetensors", "pdparams"] = "safetensors"
    """The container of the port's weights; its trainer's is .pdparams in any case."""
    use_ema: bool = True
    """Take the averaged weights, as previews do; False: the raw ones."""
    uvit_config_file: str | None = None
    """The config, by name or JSON file, of a U-ViT whose shapes do not tell it."""
    conventions: Literal["source", "trained"] = "source"
    """For the port's pipelines: the latent scale and labels that they sample with, or those of training."""
    vae_name_or_path: str | None = None
    """The VAE to put into it, ours or others' (autoencoder_kl.pth); without it the one that SOURCE has or knew."""
    text_encoder_name_or_path: str | None = None
    """The text encoder to put into it; without it the one that SOURCE has, trained or knew."""
    tokenizer_name: str | None = None
    """The tokenizer to put into it; without it the one that SOURCE has or knew."""
    overwrite: bool = False
    """Replace DEST if it is there; the old one is kept under another name."""
    license: str | None = None
    """The licence that the model card names, as the Hugging Face Hub spells it: apache-2.0, cc-by-4.0, other."""
    push_to_hub: str | None = None
    """Upload DEST to this repository of the Hugging Face Hub (USER/NAME). Nothing is uploaded without it."""
    private: bool = False
    """Make that repository a private one, where it is new."""

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.license is None:
            raise UserError(f"--push_to_hub {self.push_to_hub}: say under which --license, apache-2.0 for example")
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UserError(f"--push_to_hub {self.push_to_hub}: is no repository; give USER/NAME")
        if self.private and self.push_to_hub is None:
            raise UserError("--private: says how to upload, and nothing is uploaded without --push_to_hub")
        if self.weights == "pdparams" and self.to not in ("paddle", "port", "trainer"):
            raise UserError(f"--weights pdparams: is a container of the Paddle port's, and not of --to {self.to}")
        if self.push_to_hub is not None and self.to not in ("pipeline", "diffusers"):
            raise UserError(f"--push_to_hub {self.push_to_hub}: takes --to pipeline or diffusers, not --to {self.to}")
        for flag in _ALL:
            if (name := getattr(self, flag)) is not None and flag not in ENCODERS[self.to]:
                raise UserError(f"--{flag} {name}: has no place in what --to {self.to} writes; leave it out")
        if self.license is not None and self.to not in ("pipeline", "diffusers"):
            raise UserError(
                f"--license {self.license}: stands in a pipeline's model card, and --to {self.to} writes none"
            )
