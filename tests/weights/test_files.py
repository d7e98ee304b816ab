"""A file's container is told by its bytes; a bad file gets one sentence."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.port import same
from uvit.errors import UserError
from uvit.weights.files import container_of, read_weights
from uvit.weights.pdparams import write_pdparams

TENSORS = {"a.weight": torch.randn(3, 4), "b": torch.randn(2).half()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read")


def write(path: Path, container: str) -> Path:
    if container == "safetensors":
        save_file(TENSORS, path, {"format": "pd"})
    elif container == "pdparams":
        write_pdparams(path, TENSORS)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=container == "pth")
    return path


@pytest.mark.parametrize("container", ["safetensors", "pdparams", "pth", "legacy pth"])
def test_the_bytes_tell_and_not_the_name(container: str, tmp_path: Path) -> None:
    weights = read_weights(write(tmp_path / "weights.txt", container))
    assert weights.container == container.removeprefix("legacy ")
    assert same(weights.tensors, TENSORS)
    assert weights.paddle is (container in ("safetensors", "pdparams"))


def test_dicts_in_dicts_and_what_is_no_array(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "x")
    weights = read_weights(tmp_path / "x")
    assert list(weights.tensors) == ["state_dict.a.weight", "state_dict.b"] and weights.other_entries == ("epoch",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is not a safetensors, .pdparams or .pth file"),
        (b"PK\3\4 and no more", "damaged or truncated"),
        (b"\x40\0\0\0\0\0\0\0{}", "damaged or truncated"),
    ],
)
def test_other_files(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path / 'x'}: .*{said}"):
        read_weights(tmp_path / "x")


def test_files_without_arrays(tmp_path: Path) -> None:
    for content, said in [({"step": 3}, "no arrays"), ([torch.zeros(1)], "list"), (torch.zeros(1), "no arrays")]:
        torch.save(content, tmp_path / "x")
        with pytest.raises(UserError, match=said):
            read_weights(tmp_path / "x")
    with pytest.raises(UserError, match="cannot be read"):
        container_of(tmp_path)


class Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_torchscript_is_refused_as_code(tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(UserError, match=r"network.pt: is a TorchScript file.*get one that holds only arrays"):
        read_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pth_is_refused_by_name(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": Shell()}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system, which is not an array"):
        read_weights(tmp_path / "x")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), container=st.sampled_from(["safetensors", "pth", "legacy pth"]))
def test_cut_files(data: st.DataObject, container: str, folder: Path) -> None:
    whole = write(folder / "whole", container).read_bytes()
    (folder / "cut").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=f"^{folder / 'cut'}: "):
        read_weights(folder / "cut")
