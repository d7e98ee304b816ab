"""A file of weights, in whichever container: safetensors, Paddle's `.pdparams`, PyTorch's `.pth`.

The container is told by the first bytes, not by the name. No code of a file is run.
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
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what PyTorch's files before 1.6 begin with


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: by name; those of dicts within dicts as `outer.inner`.
        paddle: whether the container says that Linear weights are (in, out). None: it says nothing.
        others: names of entries that are no tensors.
    """

    path: Path
    container: Container
    tensors: dict[str, Tensor]
    paddle: bool | None = None
    others: tuple[str, ...] = ()


def container_of(path: Path) -> Container:
    """Raises UserError where the first bytes are none of ours."""
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
    why = "is empty" if not head else "is no safetensors, .pdparams or .pth file"
    if head.startswith(b"version https://git-lfs"):
        why = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    raise UserError(f"{path}: {why}")


def read_weights(path: Path) -> Weights:
    """Raises UserError, in one sentence, where the file is damaged, can run code or holds no arrays."""
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
            said = (file.metadata() or {}).get("format", "")
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, {"pd": True, "pt": False}.get(said)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is damaged or cut short ({error}); get it again") from None


def is_paddle_file(path: Path) -> bool:
    """Whether a safetensors file has the port's layout or its trainer's names, told by its head; no broken one has."""
    try:
        with safe_open(str(path), framework="pt") as file:
            said = (file.metadata() or {}).get("format")
            names = set(file.keys())
            pairs = [(name, f"{name.removesuffix('weight')}bias") for name in names if name.endswith(".fc1.weight")]
            turned = any(
                file.get_slice(weight).get_shape()[0] != file.get_slice(bias).get_shape()[0]
                for weight, bias in pairs
                if bias in names
            )
    except (SafetensorError, OSError, IndexError):
        return False
    return said == "pd" or turned or any(name.endswith(".linear1.weight") for name in names)


def _read_pth(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"  # a file of before 1.6 cannot be mapped into memory
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        if named is None:
            raise UserError(f"{path}: is damaged or cut short; get it again") from None
        raise UserError(
            f"{path}: asks for {named[1]}, which is no array: such a file can run code, so it is refused; get one "
            "that holds arrays only"
        ) from None
    except Exception as error:  # damaged bytes may mean anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is damaged or cut short ({reason}); get it again") from None
    if isinstance(content, Tensor):
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no dict of arrays but {type(content).__name__}")
    return content
