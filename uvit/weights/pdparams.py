"""Paddle's `.pdparams` without Paddle: a dict of arrays, as a pickle."""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError, a_type
from uvit.weights.pickles import read_pickle

NAME_TABLE = "StructuredToParameterName@@"  # Paddle's internal names of the parameters, which nothing needs


# Reading


def read_pdparams(path: Path) -> dict[str, Any]:
    """The content of the file: dicts, lists and tuples of tensors, numbers and strings.

    Raises UserError where the file is damaged, calls a function that makes no array, or does not hold a dict.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {a_type(content)}, not a dict of arrays")
    return {name: value for name, value in content.items() if name != NAME_TABLE}


# Writing


def write_pdparams(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a dict of arrays as Paddle 2 does, one tensor at a time. numpy 1 and 2 read it."""
    with path.open("wb") as file:
        file.write(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT)
        for name, tensor in tensors.items():
            _put_text(file, name)
            _put_array(file, tensor)
            file.write(pickle.SETITEM)
        file.write(pickle.STOP)


def _put_array(file: BinaryIO, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    array = (tensor.view(torch.int16).numpy().view(np.uint16)) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    # _reconstruct(ndarray, (0,), b"b"), and its state: (1, shape, dtype, Fortran order, data)
    _put_global(file, "numpy.core.multiarray", "_reconstruct")
    _put_global(file, "numpy", "ndarray")
    file.write(pickle.BININT1 + b"\0" + pickle.TUPLE1 + pickle.SHORT_BINBYTES + b"\1b" + pickle.TUPLE3 + pickle.REDUCE)
    file.write(pickle.MARK + pickle.BININT1 + b"\1" + pickle.MARK)
    for side in array.shape:
        file.write(pickle.BININT + struct.pack("<i", side))
    file.write(pickle.TUPLE)
    # dtype(code, False, True), and its state: (3, byte order, None, None, None, -1, -1, 0)
    _put_global(file, "numpy", "dtype")
    _put_text(file, array.dtype.str[1:])
    file.write(pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE + pickle.MARK + pickle.BININT1 + b"\3")
    _put_text(file, array.dtype.str[0])
    file.write(3 * pickle.NONE + 2 * (pickle.BININT + struct.pack("<i", -1)) + pickle.BININT1 + b"\0" + pickle.TUPLE)
    file.write(pickle.BUILD + pickle.NEWFALSE + pickle.BINBYTES8 + struct.pack("<Q", array.nbytes))
    file.write(array.reshape(-1).view(np.uint8).data)
    file.write(pickle.TUPLE + pickle.BUILD)


def _put_global(file: BinaryIO, module: str, name: str) -> None:
    _put_text(file, module)
    _put_text(file, name)
    file.write(pickle.STACK_GLOBAL)


def _put_text(file: BinaryIO, text: str) -> None:
    data = text.encode("utf-8")
    file.write(pickle.BINUNICODE + struct.pack("<I", len(data)) + data)
