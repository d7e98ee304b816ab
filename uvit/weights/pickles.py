"""A reader of pickles that runs no code: PyTorch's `.pth` and Paddle's `.pdparams`.

A pickle can call any function of any module. So nothing that it names is ever looked up. The few functions that make
arrays have stand-ins here. Trainers also store their settings: objects of any class. Such an object becomes an inert
`Object`, which keeps its content and is an instance of nothing else. A call of any other function is refused.
"""

import math
import pickle
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError

# Reading


def read_pickle(path: Path) -> Any:
    """The content of a plain pickle, such as a `.pdparams`. Paddle stores bfloat16 as uint16.

    Raises UserError where the file is damaged, or calls a function that makes no array.
    """

    def load() -> Any:
        with path.open("rb") as file:
            return Reader(file).load()

    return _read(path, load)


def read_pth(path: Path) -> Any:
    """The content of a file of torch.save; its tensors are on the CPU. Raises UserError as `read_pickle` does."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"  # files of PyTorch before 1.6 cannot be memory-mapped

    def load() -> Any:
        names = zipfile.ZipFile(path).namelist() if zipped else []
        if names and not any(name.endswith("data.pkl") for name in names):
            raise UserError(
                f"{path}: is an archive of {names[0]}, such as a NumPy .npz, not weights; save the arrays by name with "
                "torch.save or safetensors"
            )
        if any(name.endswith("/constants.pkl") for name in names):
            raise UserError(
                f"{path}: is a TorchScript file. Such a file can run code and is refused; get one that holds only "
                "arrays"
            )
        # torch.load finds the storages. Reader decides on whatever the pickle names, so no code is run.
        reader: Any = types.SimpleNamespace(
            __name__=__name__, Unpickler=Reader, load=lambda file, **_: Reader(file).load()
        )
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader, mmap=zipped)

    return _read(path, load)


def _read(path: Path, load: Any) -> Any:
    try:
        return _to_tensors(load())
    except RefusedError as error:
        raise UserError(
            f"{path}: asks for {error}, which is not an array. Such a file can run code and is refused; get one that "
            "holds only arrays, or, if you trust it, write its weights anew with torch.save(model.state_dict(), FILE)"
        ) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # damaged bytes raise errors of any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: is damaged or truncated ({reason}); get it again") from None


class RefusedError(Exception):
    pass


# Stand-ins


class Object(dict):
    """Stand-in for an object of any class, as pickle makes it before its content is set.

    Attributes:
        state: what the object's attributes were set to.
    """

    state: Any = None
    __hash__ = object.__hash__  # type: ignore[assignment]  # a key of a dict may be one

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        """For subclasses of list and set."""

    extend = add = append


class _Named(type):
    """The class of unknown names: pickle may make objects of them, and call nothing."""

    asked: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RefusedError(cls.asked)


class _Dtype:
    """Stand-in for numpy.dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not isinstance(code, str) or code[:1] not in "fiub" or not code[1:].isdigit():
            raise RefusedError(f"an array of type {code!r}")
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
            raise RefusedError(f"the coding {coding!r}")
        return text.encode("latin1")


class _EmptyBytes(_Standin):
    """Old pickle protocols store empty bytes as a call of bytes()."""

    def __new__(cls) -> Any:
        return b""


class _Tensor(_Standin):
    def __new__(cls, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
        return torch._utils._rebuild_tensor(storage, offset, size, stride)


class _TensorOfType(_Standin):
    """Of types for which PyTorch has no storage, such as uint16."""

    def __new__(
        cls, storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> Any:
        return torch.empty(0, dtype=dtype).set_(storage._untyped_storage, offset, size, stride)


class _Parameter(_Standin):
    """A parameter is taken as its tensor."""

    def __new__(cls, tensor: Any, *_: Any) -> Any:
        return tensor


class _Subclass(_Standin):
    """A tensor with attributes is taken as its tensor."""

    def __new__(cls, function: Any, kind: Any, args: Any, state: Any) -> Any:
        if function not in (_Tensor, _TensorOfType, _Parameter):
            raise RefusedError(getattr(function, "asked", "a tensor of another class"))
        return function(*args)


_STANDINS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
    ("builtins", "bytes"): _EmptyBytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _TensorOfType,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _Subclass,
    ("builtins", "tuple"): tuple,  # Paddle stores (name, array)
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
    # Settings that pickle makes with a call. They stay inert.
    **{
        (module, name): Object
        for modules, names in {
            ("builtins",): ("set", "frozenset", "complex", "bytearray", "slice", "range"),
            ("collections",): ("defaultdict", "deque"),
            ("copyreg",): ("_reconstructor",),  # how old pickle protocols make any object
            ("datetime",): ("date", "datetime", "time", "timedelta", "timezone"),
            ("diffusers.configuration_utils",): ("FrozenDict",),
            ("functools",): ("partial",),
            ("pathlib", "pathlib._local"): (
                "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath",
            ),
            ("types",): ("SimpleNamespace",),
            ("torch",): ("device",),
            ("torch.serialization",): ("_get_layout",),
        }.items()
        for module in modules
        for name in names
    },
}  # fmt: skip


class Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # names of Python 2
        if (module, name) in _STANDINS:
            return _STANDINS[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return _Named(name, (Object,), {"asked": f"{module}.{name}"})


# What was read


def _to_tensors(value: Any) -> Any:
    """Arrays become tensors; of Paddle's (name, array) the array is taken; an object becomes its content."""
    if isinstance(value, _Array):
        array = np.require(value.value, requirements=["C", "W"])  # a copy, as the bytes of the file are read-only
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return _to_tensors(value[1])
    if isinstance(value, (list, tuple)):
        return [_to_tensors(item) for item in value]
    if isinstance(value, Object) and isinstance(value.state, dict) and "_modules" in value.state:
        return _to_tensors(dict(_module_entries(value.state)))
    if isinstance(value, Object) and not value:
        return None
    if isinstance(value, dict):
        return {str(key): _to_tensors(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bytes, int, float, Tensor)):
        return value
    return None  # a part of the settings


def _module_entries(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The state dict of a whole torch.nn.Module, by its attributes."""
    for group in ("_parameters", "_buffers"):
        for name, value in state.get(group, {}).items():
            if value is not None:
                yield f"{prefix}{name}", value
    for name, module in state["_modules"].items():
        if isinstance(module, Object) and isinstance(module.state, dict) and "_modules" in module.state:
            yield from _module_entries(module.state, f"{prefix}{name}.")
