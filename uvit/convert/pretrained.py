"""`UViTT2IModel` as `from uvit import UViTT2IModel` gives it: it also opens what the official code and the port wrote.

The model file knows no files, so its `from_pretrained` gets that from here.
"""

from pathlib import Path
from typing import Any

from uvit.convert.folder import looks_foreign, open_part
from uvit.model import UViTT2IModel

_of_diffusers = UViTT2IModel.from_pretrained.__func__


def from_pretrained(cls: type[UViTT2IModel], pretrained_model_name_or_path: Any, **kwargs: Any) -> UViTT2IModel:
    """As in diffusers, from safetensors only; and of the files and folders that `uvit convert` reads, in memory.

    Raises UserError where such a file or folder holds no U-ViT, or is broken.
    """
    path = Path(pretrained_model_name_or_path).expanduser() / (kwargs.get("subfolder") or "")
    if not looks_foreign(str(path)):
        model: UViTT2IModel = _of_diffusers(cls, pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        return model
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    model = open_part(path, "unet").eval()
    return model if dtype is None else model.to(dtype)


UViTT2IModel.from_pretrained = classmethod(from_pretrained)
