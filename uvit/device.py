"""Which device to compute on."""

import os

import torch

from uvit.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises UserError if this machine does not have the device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try --device auto"
        ) from None
    return device


def own_device(name: str) -> torch.device:
    """The same for processes that share work without talking to one another: with `auto`, each process that torchrun
    started on a machine has its own GPU.
    """
    if name == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return pick_device(f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}")
    return pick_device(name)
