"""Files of torch.save with anything beside the arrays: the arrays are read, and no code is run."""

import argparse
import collections
import datetime
import functools
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.port import same
from uvit.errors import UserError
from uvit.weights.files import read_weights
from uvit.weights.pickles import read_pth

TENSORS = {"a.weight": torch.randn(3, 4), "b": torch.randn(2).half()}


class Holder:
    """An object of a class that the reader does not know."""

    def __init__(self) -> None:
        self.learning_rate = 1e-4


def test_settings_beside_the_arrays_stay_inert(tmp_path: Path) -> None:
    settings = {
        "args": argparse.Namespace(path=Path("x"), device=torch.device("cpu"), sizes={1, 2}),
        "config": Holder(),
        "class": Holder,
        "function": os.system,  # named, and not called
        "when": datetime.datetime(2024, 1, 1),
        "counts": collections.defaultdict(int, {"a": 1}),
        "scalars": [np.float32(1), np.int64(2)],
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "kind": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    }
    for protocol in (2, 3, 4, 5):
        torch.save({**settings, "model": TENSORS}, tmp_path / "x", pickle_protocol=protocol)
        weights = read_weights(tmp_path / "x")
        assert same(weights.tensors, {f"model.{name}": value for name, value in TENSORS.items()})
        assert set(weights.other_entries) >= {"args", "config", "when", "dtype", "kind"}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "builtins.eval"), (getattr, "builtins.getattr"), (torch.load, "torch.serialization.load"),
        (Holder, "tests.weights.test_pickles.Holder"), (os.popen, "os.popen"),
    ],
)  # fmt: skip
def test_a_call_is_refused_by_name_and_the_way_out_is_said(function: Any, name: str, tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return function, ("1",)

    torch.save({"model": TENSORS, "x": Call()}, tmp_path / "x")
    with pytest.raises(UserError, match=rf"asks for {name}, which is not an array.*torch.save\(model.state_dict\(\)"):
        read_weights(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_types_and_views_of_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {
        "whole": whole,
        "view": whole[1:3, ::2],
        "turned": whole.t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(tensors, tmp_path / "x")
    found = read_weights(tmp_path / "x").tensors
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name].float(), value.detach().float())
        assert not found[name].requires_grad


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"x/{name}", b"")
    with pytest.raises(UserError, match="is a TorchScript file"):
        read_pth(tmp_path / "x")


def test_an_npz_by_another_name_is_told_from_damage(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weight=np.zeros(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: is an archive of weight\.npy, such as a NumPy \.npz"):
        read_pth(tmp_path / "x.pt")
