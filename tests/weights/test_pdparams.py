"""Arrays come through bit for bit; nothing else comes through."""

import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.port import same
from uvit.errors import UserError
from uvit.weights.pdparams import NAME_TABLE, read_pdparams, write_pdparams

ARRAYS = {
    "linear.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([1.5, -2], np.float16),
    "step": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "big_endian": np.array([1, 2], ">f4"),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pdparams")


def pickled(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    content = OrderedDict(ARRAYS) | {"named": ("linear_0.w_0", ARRAYS["half"]), "scalar": np.float32(0.5), "lr": 0.1}
    content |= {NAME_TABLE: {"linear.weight": "linear_0.w_0"}, "inner": {"deep": ARRAYS["half"]}}
    found = read_pdparams(pickled(tmp_path / "x", content, protocol))
    for name, array in ARRAYS.items():
        assert found[name].numpy().dtype == array.dtype.newbyteorder("="), name
        assert np.array_equal(found[name].numpy(), array), name
    assert torch.equal(found["named"], found["half"]) and torch.equal(found["inner"]["deep"], found["half"])
    assert found["scalar"] == 0.5 and found["lr"] == 0.1 and NAME_TABLE not in found


def test_old_names_of_numpy(tmp_path: Path) -> None:
    """Paddle 2 writes numpy 1's names; protocol 0 spells them as text."""
    data = pickle.dumps({"a": ARRAYS["half"]}, 2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "x").write_bytes(data)
    assert torch.equal(read_pdparams(tmp_path / "x")["a"], torch.tensor([1.5, -2], dtype=torch.float16))


def test_bfloat16_is_uint16_there(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.5, -2], dtype=torch.bfloat16)}
    write_pdparams(tmp_path / "x", tensors)
    assert same(read_pdparams(tmp_path / "x"), tensors)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
)
def test_round_trip(shapes: list[list[int]], dtype: torch.dtype, folder: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(shape).mul(9).to(dtype) for i, shape in enumerate(shapes)}
    write_pdparams(folder / "x", tensors)
    assert same(read_pdparams(folder / "x"), tensors)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 wants its modules called otherwise
def test_plain_pickle_and_numpy_read_what_is_written(tmp_path: Path) -> None:
    """So Paddle does, which does just that."""
    tensors = {"größe": torch.randn(3, 4), "half": torch.randn(2).half(), "number": torch.tensor(3)}
    write_pdparams(tmp_path / "x", tensors)
    found = pickle.loads((tmp_path / "x").read_bytes())
    assert same({name: torch.from_numpy(np.array(array)) for name, array in found.items()}, tensors)
    names = {arg for _, arg, _ in pickletools.genops((tmp_path / "x").read_bytes()) if isinstance(arg, str)}
    assert "numpy.core.multiarray" in names


# What is not arrays


class Shell:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_is_refused_by_name_and_not_run(protocol: int, tmp_path: Path) -> None:
    path = pickled(tmp_path / "x", {"a": Shell(tmp_path / "ran")}, protocol)
    with pytest.raises(UserError, match=rf"^{path}: asks for (posix|nt)\.system, which is not an array"):
        read_pdparams(path)
    assert not (tmp_path / "ran").exists()


WORD = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12)
NAMED = [
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy.core.multiarray", "fromfile"),
    ("torch", "load"),
    ("_codecs", "decode"),
    ("collections", "Counter"),
    ("uvit.weights.pdparams", "_Array"),
]


@settings(max_examples=60, deadline=None)
@given(asked=st.one_of(st.sampled_from(NAMED), st.tuples(WORD, WORD)), stack=st.booleans())
def test_any_other_name_is_refused(asked: tuple[str, str], stack: bool, folder: Path) -> None:
    module, name = asked
    if stack:
        call = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in asked) + b"\x93"
    else:
        call = f"c{module}\n{name}\n".encode()
    (folder / "x").write_bytes(b"\x80\x04" + call + b")R.")
    with pytest.raises(UserError, match=rf"asks for {module}\.{name}, which is not an array"):
        read_pdparams(folder / "x")


@pytest.mark.parametrize(
    "attack",
    [
        b"cnumpy\ndtype\n(\x8c\x01OI00I01tR.",  # objects
        b"c_codecs\nencode\n(\x8c\x01a\x8c\x03zlbtR.",  # another coding
        b"cnumpy.core.multiarray\n_reconstruct\n}\x8c\x08__call__K\x01sb.",  # a stand-in changed
        b"cnumpy\nndarray\n}\x8c\x08__call__K\x01s\x86b.",
        b"\x8c\x01aQ.",  # a persistent id
        b"\x82\x01.",  # an extension
        b"(lp0\n.",  # a list
        b"N.",
    ],
)
def test_other_ways_in_are_refused(attack: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x80\x04" + attack)
    with pytest.raises(UserError):
        read_pdparams(tmp_path / "x")


def test_arrays_must_be_as_long_as_they_say(tmp_path: Path) -> None:
    write_pdparams(tmp_path / "x", {"a": torch.zeros(3, 4)})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(b"J" + struct.pack("<i", 4), b"J" + struct.pack("<i", 5)))
    with pytest.raises(UserError, match="12 numbers for the shape"):
        read_pdparams(tmp_path / "x")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_damaged_files(data: st.DataObject, folder: Path) -> None:
    """Cut or changed anywhere: arrays, or one sentence."""
    whole = pickle.dumps({name: ARRAYS[name] for name in ("linear.weight", "half")} | {NAME_TABLE: {"a": "b"}}, 4)
    cut = data.draw(st.integers(0, len(whole)))
    bytes_ = bytearray(whole[:cut])
    for place in data.draw(st.lists(st.integers(0, max(cut - 1, 0)), max_size=3)) if cut else []:
        bytes_[place] = data.draw(st.integers(0, 255))
    (folder / "damaged").write_bytes(bytes_)
    try:
        assert isinstance(read_pdparams(folder / "damaged"), dict)
    except UserError as error:
        assert str(folder / "damaged") in str(error)
