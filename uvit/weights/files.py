"""Reading a file of weights in any container: safetensors, Paddle's `.pdparams`, PyTorch's `.pth`.

The first bytes tell the container, not the name of the file. No code in a file is run.
"""

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uvit.errors import UserError
from uvit.weights.pdparams import read_pdparams

Container = Literal["safetensors", "pdparams", "pth"]
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of PyTorch before 1.6 begin


@dataclass(frozen=True)
class Weights:
    """The content of a file.

    Attributes:
        tensors: by name; those in nested dicts as `outer.inner`.
        paddle: whether the container says that Linear weights are (in, out). None: it does not say.
        other_entries: the names of entries that are not tensors.
    """

    path: Path
    container: Container
    tensors: dict[str, Tensor]
    paddle: bool | None = None
    other_entries: tuple[str, ...] = ()


def container_of(path: Path) -> Container:
    """Raises UserError where the first bytes are of no container that can be read."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if head[:2] == b"PK" or head.startswith(LEGACY_TORCH):
        return "pth"
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and len(head) > 1:
        return "pdparams"
    problem = "is empty" if not head else "is not a safetensors, .pdparams or .pth file"
    if head.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    raise UserError(f"{path}: {problem}")


def read_weights(path: Path) -> Weights:
    """Raises UserError where the file is damaged, asks to run code or holds no arrays."""
    container = container_of(path)
    paddle = None
    if container == "safetensors":
        content, paddle = _read_safetensors(path)
    elif container == "pdparams":
        content, paddle = read_pdparams(path), True
    else:
        content, paddle = _read_pth(path), False
    entries = dict(_flat(content))
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no arrays")
    return Weights(path, container, tensors, paddle, tuple(name for name in entries if name not in tensors))


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    try:
        with safe_open(str(path), framework="pt") as file:
            layout = (file.metadata() or {}).get("format", "")
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, {"pd": True, "pt": False}.get(layout)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is damaged or truncated ({error}); get it again") from None


def is_paddle_file(path: Path) -> bool:
    """Whether the header of a safetensors file shows PaddleMIX's layout or names. False for a damaged file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            layout = (file.metadata() or {}).get("format")
            names = set(file.keys())
            pairs = [(name, f"{name.removesuffix('weight')}bias") for name in names if name.endswith(".fc1.weight")]
            transposed = any(
                file.get_slice(weight).get_shape()[0] != file.get_slice(bias).get_shape()[0]
                for weight, bias in pairs
                if bias in names
            )
    except (SafetensorError, OSError, IndexError):
        return False
    return layout == "pd" or transposed or any(name.endswith(".linear1.weight") for name in names)


def _read_pth(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"  # files of PyTorch before 1.6 cannot be memory-mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        if code is None:
            raise UserError(f"{path}: is damaged or truncated; get it again") from None
        raise UserError(
            f"{path}: asks for {code[1]}, which is not an array. Such a file can run code and is refused; "
            "get one that holds only arrays"
        ) from None
    except Exception as error:  # damaged bytes raise errors of any type
        reason = " ".join(str(error).split())[:200]
        if "TorchScript" in reason:
            raise UserError(
                f"{path}: is a TorchScript file. Such a file can run code and is refused; get one that holds "
                "only arrays"
            ) from None
        raise UserError(f"{path}: is damaged or truncated ({reason}); get it again") from None
    if isinstance(content, Tensor):
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of arrays")
    return content
