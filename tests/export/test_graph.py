"""Graphs of the U-ViT compute what it does, for any number of images."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.port import tiny_modern_unet, tiny_unet
from uvit.errors import UserError
from uvit.export.graph import compare, example_inputs, write_export, write_onnx
from uvit.model import UViTT2IModel
from uvit.weights.report import Report

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def test_export(tmp_path: Path) -> None:
    unet, report = tiny_unet(), Report()
    write_export(unet, tmp_path, report)
    assert report.converted[0].startswith("unet.pt2: differs from the model by ")
    graph = torch.export.load(tmp_path / "unet.pt2").module()
    for batch in (1, 5):
        inputs = example_inputs(unet, batch)
        torch.testing.assert_close(graph(*inputs), unet(*inputs))


def test_a_graph_that_differs_is_refused() -> None:
    unet = tiny_unet()
    assert compare(unet, unet) == "differs from the model by 0.0e+00 of its largest output"
    with pytest.raises(UserError, match=r"the graph differs from the model by 1\.0e-02"):
        compare(unet, lambda *inputs: unet(*inputs) * 1.01)
    with pytest.raises(UserError, match="differs from the model by nan"):
        compare(unet, lambda *inputs: unet(*inputs) * float("nan"))


@pytest.mark.skipif(not HAS_ONNX, reason="the onnx extra is not installed")
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("make", [tiny_unet, tiny_modern_unet])
def test_onnx(make: Callable[[], UViTT2IModel], tmp_path: Path) -> None:
    report = Report()
    write_onnx(make(), tmp_path, report)
    assert report.converted[0].startswith("unet.onnx: differs from the model by ") and report.dropped == []


@pytest.mark.skipif(HAS_ONNX, reason="the onnx extra is installed")
def test_onnx_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to onnx: onnx\w* is not installed; pip install 'uvit\[onnx\]'"):
        write_onnx(tiny_unet(), tmp_path, Report())
