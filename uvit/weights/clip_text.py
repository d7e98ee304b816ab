"""A CLIP text encoder as transformers saves it, read without its `from_pretrained`.

The same model, in a tenth of the time: `from_pretrained` first prepares for the names that other models once had.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel


def read_clip_text(folder: Path, dtype: torch.dtype) -> CLIPTextModel | None:
    """What `CLIPTextModel.from_pretrained(folder, dtype=dtype)` returns, in eval mode.

    None: the folder is not whole, or has anything else, older names for example; `from_pretrained` says which.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content.get("model_type") != "clip_text_model" or "quantization_config" in content:
            return None
        weights = load_file(folder / "model.safetensors")
        config: Any = CLIPTextConfig.from_pretrained(folder)
        config.dtype, config._name_or_path = dtype, str(folder)
        with _NoInitialisation():
            model = CLIPTextModel(config)
    except Exception:  # a wrong value raises errors of any type
        return None
    expected = model.state_dict()
    if {name: value.shape for name, value in expected.items()} != {name: v.shape for name, v in weights.items()}:
        return None
    if any(not value.is_floating_point() for value in weights.values()):
        return None
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return model.to(dtype).eval()


class _NoInitialisation(TorchFunctionMode):
    """Leaves parameters as they are allocated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) in ("torch.nn.init", "transformers.initialization"):
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))
