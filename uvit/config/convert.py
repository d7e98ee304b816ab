"""Flags of `uvit convert`."""

from dataclasses import dataclass
from typing import Literal

from uvit.config.paths import PathFlag, expand_paths
from uvit.errors import UserError

# The encoders that each format holds beside the U-ViT.
_ALL = ("vae_name_or_path", "text_encoder_name_or_path", "tokenizer_name")
ENCODERS: dict[str, tuple[str, ...]] = {
    "pipeline": _ALL,
    "diffusers": _ALL,
    "space": _ALL,
    "port": _ALL,
    "trainer": _ALL[:2],
    "official": _ALL[:1],
    "paddle": (),
    "export": (),
    "onnx": (),
}


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a model between formats: checkpoints, pipelines, and weights of the official U-ViT code and PaddleMIX.

    The format of SOURCE is detected from its contents. A report lists what was read, converted, filled in and dropped.

    uvit convert output/run/checkpoint-5000 output/pipeline
    """

    # Most used
    source: PathFlag
    """A checkpoint-N folder, a pipeline folder, or weights of the official U-ViT code or of PaddleMIX: a file or a
    folder."""
    dest: PathFlag
    """The folder to write."""
    to: Literal["pipeline", "diffusers", "space", "official", "paddle", "port", "trainer", "export", "onnx"] = (
        "pipeline"
    )
    """The format to write. pipeline: a pipeline folder; diffusers: the same with its code inside, for diffusers without
    this package; space: this with a page by Gradio, for a Hugging Face Space; official: .pth files of the official
    U-ViT code; port: PaddleMIX's pipeline folder; paddle: its U-ViT alone; trainer: its trainer's checkpoint; export,
    onnx: the U-ViT as a torch.export or ONNX graph."""
    use_ema: bool = True
    """Use the EMA weights, as previews do; False: the raw weights."""
    overwrite: bool = False
    """Replace DEST. The old one is kept under another name."""

    # Components
    uvit_config_file: PathFlag | None = None
    """The model config, if it cannot be inferred from the weights: the name of a model preset, or a JSON file."""
    vae_name_or_path: PathFlag | None = None
    """The VAE to include, in diffusers' format or the official one (autoencoder_kl.pth). Default: the one SOURCE has or
    names."""
    text_encoder_name_or_path: PathFlag | None = None
    """The text encoder to include. Default: the one in SOURCE, or the one that SOURCE names."""
    tokenizer_name: PathFlag | None = None
    """The tokenizer to include. Default: the one in SOURCE, or the one that SOURCE names."""

    # PaddleMIX
    weights: Literal["safetensors", "pdparams"] = "safetensors"
    """The file format of weights for PaddleMIX. Its trainer's checkpoints are always .pdparams."""
    conventions: Literal["source", "trained"] = "source"
    """Latent scale and timesteps of a PaddleMIX pipeline: those it samples with (source) or was trained with."""

    # Hugging Face Hub
    license: str | None = None
    """The licence in the model card, as the Hub spells it: apache-2.0, cc-by-4.0, other."""
    push_to_hub: str | None = None
    """Upload DEST to this repository on the Hugging Face Hub (USER/NAME), a Space with --to space. Without it nothing
    is uploaded."""
    private: bool = False
    """Make the repository private, if it is new."""

    def __post_init__(self) -> None:
        expand_paths(self)
        if self.push_to_hub is not None and self.license is None:
            raise UserError(f"--push_to_hub {self.push_to_hub}: needs a --license, such as apache-2.0")
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UserError(f"--push_to_hub {self.push_to_hub}: is no repository; give USER/NAME")
        if self.private and self.push_to_hub is None:
            raise UserError("--private: nothing is uploaded without --push_to_hub")
        if self.weights == "pdparams" and self.to not in ("paddle", "port", "trainer"):
            raise UserError(f"--weights pdparams: is a file format of PaddleMIX, and not of --to {self.to}")
        if self.push_to_hub is not None and self.to not in ("pipeline", "diffusers", "space"):
            raise UserError(
                f"--push_to_hub {self.push_to_hub}: needs --to pipeline, diffusers or space, not --to {self.to}"
            )
        for flag in _ALL:
            if (name := getattr(self, flag)) is not None and flag not in ENCODERS[self.to]:
                raise UserError(f"--{flag} {name}: is not part of what --to {self.to} writes; leave it out")
        if self.license is not None and self.to not in ("pipeline", "diffusers", "space"):
            raise UserError(
                f"--license {self.license}: belongs in a pipeline's model card, and --to {self.to} writes none"
            )
