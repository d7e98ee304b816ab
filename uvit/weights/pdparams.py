"""Paddle's `.pdparams` without Paddle: a reader that allows arrays and nothing else, and a writer.

Such a file is a pickle, and a pickle can call any function of any module. So nothing that it names is ever looked up.
The few names that arrays need have stand-ins here. Any other name is refused.
"""

import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError

NAME_TABLE = "StructuredToParameterName@@"  # Paddle's internal names of the parameters, which nothing needs


# Reading


def read_pdparams(path: Path) -> dict[str, Any]:
    """The content of the file: dicts, lists and tuples of tensors, numbers and strings.

    Paddle stores bfloat16 as uint16. Raises UserError where the file is damaged, asks for anything but arrays, or does
    not hold a dict.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file).load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict of arrays")
        return {str(key): _to_tensors(value) for key, value in content.items() if key != NAME_TABLE}
    except _RefusedError as error:
        raise UserError(
            f"{path}: asks for {error}, which is not an array. Such a file can run code and is refused; get one "
            "that holds only arrays"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # damaged bytes raise errors of any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: is damaged or truncated ({reason}); get it again") from None


class _RefusedError(Exception):
    pass


class _Dtype:
    """Stand-in for numpy.dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not isinstance(code, str) or code[:1] not in "fiub" or not code[1:].isdigit():
            raise _RefusedError(f"an array of type {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.code if self.order not in ("<", ">") else self.order + self.code)


class _Array:
    """Stand-in for numpy.ndarray."""

    __slots__ = ("value",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise ValueError("an array without data")
    array = np.frombuffer(data, dtype.numpy())
    if math.prod(shape) != array.size:
        raise ValueError(f"an array of {array.size} numbers for the shape {shape}")
    return array.reshape(shape, order="F" if order == "F" else "C")


# Each stand-in has a __setstate__, so a pickle that tries to change one calls it instead of setting attributes.
class _Standin:
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function has no state")


class _Reconstruct(_Standin):
    def __new__(cls, kind: Any, shape: Any, code: Any) -> Any:
        return _Array()


class _FromBuffer(_Standin):
    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any) -> Any:
        array = _Array()
        array.value = _array(data, dtype, shape, order)
        return array


class _Scalar(_Standin):
    def __new__(cls, dtype: Any, data: Any) -> Any:
        return _array(data, dtype, (), "C").item()


class _Encode(_Standin):
    """Old pickle protocols store bytes as text."""

    def __new__(cls, text: str, coding: str) -> Any:
        if coding != "latin1":
            raise _RefusedError(f"the coding {coding!r}")
        return text.encode("latin1")


class _Empty(_Standin):
    """Old pickle protocols store empty bytes as a call of bytes()."""

    def __new__(cls) -> Any:
        return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
    ("__builtin__", "bytes"): _Empty,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, "tuple"): tuple for module in ("builtins", "__builtin__")},  # Paddle stores (name, array)
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


def _to_tensors(value: Any) -> Any:
    """Arrays become tensors; of Paddle's (name, array) the array is taken."""
    if isinstance(value, _Array):
        array = np.require(value.value, requirements=["C", "W"])  # a copy, as the bytes of the file are read-only
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return _to_tensors(value[1])
    if isinstance(value, (list, tuple)):
        return [_to_tensors(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _to_tensors(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    raise ValueError(f"it holds a {type(value).__name__}")


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
