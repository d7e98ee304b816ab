"""Reading a file of weights in any container: safetensors, Paddle's `.pdparams`, PyTorch's `.pth`.

The first bytes tell the container, not the name of the file. No code in a file is run.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from uvit.errors import UserError, a_type
from uvit.weights.pdparams import read_pdparams
from uvit.weights.pickles import read_pth

Container = Literal["safetensors", "pdparams", "pth"]
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of PyTorch before 1.6 begin
SHARD = re.compile(r"(.+[-_])(\d{5})-of-(\d{5})(\.\w+)")
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Weights:
    """The content of a file, or of all files of a set of shards.

    Attributes:
        tensors: by name; those in nested dicts and lists as `outer.inner`, in the order of the file.
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


def shards_of(path: Path) -> list[Path]:
    """All files of the set that a shard, NAME-00001-of-00002.SUFFIX, belongs to, or that an index names; else the file.

    Raises UserError where one of them is missing.
    """
    if path.name.endswith(INDEX_SUFFIX):
        try:
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: is not an index of weights ({error!r}); give one of its files") from None
    elif (found := SHARD.fullmatch(path.name)) is not None:
        names = [f"{found[1]}{i:05d}-of-{found[3]}{found[4]}" for i in range(1, int(found[3]) + 1)]
    else:
        return [path]
    if any(Path(str(name)).name != name for name in names) or not names:
        raise UserError(f"{path}: names files that are not beside it; give one of its files")
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise UserError(f"{path}: belongs to {len(names)} files, and {missing[0]} is missing; get it too")
    return [path.with_name(name) for name in names]


def read_weights(path: Path) -> Weights:
    """Raises UserError where the file is damaged, asks to run code or holds no arrays, or another shard is missing."""
    shards = [_read_file(shard) for shard in shards_of(path)]
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if twice := tensors.keys() & shard.tensors.keys():
            raise UserError(f"{shard.path}: holds {min(twice)}, which another file of its set holds too; get it again")
        tensors |= shard.tensors
    others = tuple(name for shard in shards for name in shard.other_entries)
    return Weights(path, shards[0].container, tensors, shards[0].paddle, others)


def _read_file(path: Path) -> Weights:
    container = container_of(path)
    paddle = None
    content: Any
    if container == "safetensors":
        content, paddle = _read_safetensors(path)
    elif container == "pdparams":
        content, paddle = read_pdparams(path), True
    else:
        content, paddle = read_pth(path), False
    if not isinstance(content, (dict, Tensor)):
        raise UserError(f"{path}: holds {a_type(content)}, not a dict of arrays")
    entries = dict(_flat(content)) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no arrays")
    return Weights(path, container, tensors, paddle, tuple(name for name in entries if name not in tensors))


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict) and any(isinstance(item, (Tensor, dict, list)) for item in inner.values()):
            yield from _flat(inner, f"{prefix}{key}.")
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
