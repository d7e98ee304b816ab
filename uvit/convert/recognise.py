"""What a set of weights is, by the names and shapes in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from uvit.convert.report import some
from uvit.errors import UserError

Kind = Literal["uvit", "trainer", "vae", "ldm_vae", "text_encoder"]

WRAPPERS = ("state_dict.", "model.", "module.", "_orig_mod.")  # what trainers put around a whole network's names

# One name of each network that no other has.
_SIGNS: dict[Kind, tuple[str, ...]] = {
    "trainer": ("unet.pos_embed",),
    "uvit": ("pos_embed", "mid_block.attn.qkv.weight", "patch_embed.proj.weight"),
    "vae": ("encoder.mid_block.resnets.0.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight"),
    "ldm_vae": ("encoder.mid.block_1.conv1.weight", "decoder.mid.block_1.conv1.weight"),
    "text_encoder": (
        "text_model.embeddings.token_embedding.weight",
        "embeddings.token_embedding.weight",
        "text_model.token_embedding.weight",
    ),
}
_WORDS: dict[Kind, str] = {
    "trainer": "a checkpoint of the Paddle trainer",
    "uvit": "a U-ViT",
    "vae": "a VAE",
    "ldm_vae": "a VAE under its first names",
    "text_encoder": "a CLIP text encoder",
}
_OTHERS = {  # U-ViTs of other tasks
    "label_emb.weight": "is a U-ViT for classes, not for text",
    "time_embed.0.weight": "is a U-ViT with an MLP on its time token, which ours does not have",
}


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what stands around all names."""
    found = dict(tensors)
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def recognise(tensors: Mapping[str, Tensor], path: Path) -> Kind:
    """What the (unwrapped) tensors are. Raises UserError where they are several things, or nothing known."""
    kinds = [kind for kind, signs in _SIGNS.items() if any(sign in tensors for sign in signs)]
    for name, what in _OTHERS.items():
        if kinds == ["uvit"] and name in tensors:
            raise UserError(f"{path}: {what}; only text-to-image U-ViTs can be converted")
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise UserError(
            f"{path}: mixes {' and '.join(_WORDS[kind] for kind in kinds)} in one file; give a file for each"
        )
    raise UserError(
        f"{path}: holds {len(tensors)} arrays ({some(sorted(tensors))}) that are no U-ViT, VAE or CLIP text encoder"
    )


def describe(kind: Kind) -> str:
    return _WORDS[kind]
