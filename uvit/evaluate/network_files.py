"""Weight files of networks that this package defines itself, such as FID's Inception."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from uvit.errors import UserError
from uvit.io import file_sha256
from uvit.weights.files import read_weights

T = TypeVar("T", bound=nn.Module)


def load_network_file(path: Path, network_class: type[T], what: str, remedy: str) -> tuple[T, str]:
    """The network of a `.pth` or safetensors file, float32, eval mode, frozen; and the SHA-256 of the file.

    Args:
        what, remedy: for the message: what the file should be, and where to get it.

    Raises UserError where the file is not of this network.
    """
    with torch.device("meta"):
        network = network_class()
    tensors = read_weights(path).tensors
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=torch.int64))  # not used
        elif name not in tensors or tensors[name].shape != tensor.shape:
            found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
            raise UserError(
                f"{path}: is not {what} ({name} {found}, and should have shape {tuple(tensor.shape)}); {remedy}"
            )
    network.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted}, assign=True)
    return network.eval().requires_grad_(False), file_sha256(path)
