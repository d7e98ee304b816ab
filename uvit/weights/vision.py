"""Load vision models of transformers, from a folder or from the local Hub cache: nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel

from uvit.errors import UserError
from uvit.weights.encoders import check_finite, is_local_path, quiet


def load_vision_model(place: str) -> tuple[Any, bool, Any]:
    """(any vision model of transformers, whether it has weights of a pooler, its image processor).

    Raises UserError where there is none.
    """

    def load(place: str) -> tuple[Any, bool, Any]:
        model, has_pooler = load_whole_model(AutoModel, place)
        return model, has_pooler, AutoImageProcessor.from_pretrained(place, backend="pil", local_files_only=True)

    return from_folder_or_cache(load, place, "a vision model with its image processor")


def load_whole_model(cls: Any, place: str) -> tuple[Any, bool]:
    """A model with whole and finite weights, float32, eval mode, frozen; and whether there are weights of a pooler."""
    model, info = cls.from_pretrained(
        place, use_safetensors=True, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    if missing:
        raise ValueError(f"its weights lack {len(missing)} parameters, the first being {sorted(missing)[0]}")
    check_finite(model.state_dict(), place)
    return model.eval().requires_grad_(False), not info["missing_keys"]


def from_folder_or_cache(load: Callable[[str], Any], place: str, what: str, size: str = "") -> Any:
    """Load from a folder, or from the local Hub cache. Raises UserError that says where the files go.

    Args:
        what: what `load` loads. size: of its files, for people who have to get them.
    """
    folder = Path(place)
    if folder.is_file() or (is_local_path(place) and not folder.is_dir()):
        problem = "is a file" if folder.is_file() else "no such folder"
        raise UserError(f"{place}: {problem}; give the folder of {what}")
    try:
        with quiet():
            return load(place)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        if folder.is_dir():
            raise UserError(f"{place}: {what} cannot be loaded from there ({reason})") from None
        raise UserError(
            f"{place}: its files{size and f' ({size})'} are not in the Hub cache on this machine; get them with "
            f"`hf download {place}` where there is a network, or name a folder that has them"
        ) from None
