"""The first hour on a GPU, very small and on the CPU; and that it stops at what is wrong."""

import contextlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretend_gpu import pretend_gpus

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("first_gpu_hour", BENCHMARKS / "first_gpu_hour.py")
assert spec is not None and spec.loader is not None
hour: Any = importlib.util.module_from_spec(spec)
sys.modules["first_gpu_hour"] = hour  # where its dataclasses look for their types
spec.loader.exec_module(hour)


def run(folder: Path, *checks: str) -> tuple[int, str]:
    """-> (exit status, the report)"""
    status = hour.main(["--device", "cpu", "--tiny", "--output_dir", str(folder), "--only", *checks])
    return status, (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*profiler.*")
def test_the_checks_pass_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hour, "PRECISIONS", {name: hour.PRECISIONS[name] for name in ("float32", "bf16")})
    monkeypatch.setattr(hour, "MODES", {"bf16": hour.MODES["bf16"]})
    status, report = run(tmp_path / "hour", "card", "training", "attention", "speed", "sampling")
    assert status == 0 and "WRONG" not in report
    assert re.search(r"\| float32 \| 0\.0e\+00 \| 0\.0e\+00 \| 0\.0e\+00 \|", report)
    bf16 = re.search(r"\| bf16 \| (\S+) \| (\S+) \| (\S+) \|", report)
    assert bf16 is not None and all(float(value) > 0 for value in bf16.groups())
    assert len(re.findall(r"^\| (?:33|16) x 33 \| MATH \| ", report, re.MULTILINE)) == 2
    assert re.search(r"\| tiny \| bf16 \| 4 \| [\d,]+ \| ", report)
    assert re.search(r"\| extract, 8 images \| \d", report) and re.search(r"\| sample, float32, .* \| \d", report)
    for lines in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):  # every row has as many cells as its head
        assert len({line.count("|") for line in lines.splitlines()}) == 1, lines


def test_training_that_differs_ends_the_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_data = (("--bf16", "False", "--noise_offset", "0.05"), hour.PRECISIONS["bf16"][1])
    monkeypatch.setattr(hour, "PRECISIONS", {"planted": other_data})
    status, report = run(tmp_path / "hour", "training", "attention")
    assert status == 1 and "Each backend" not in report
    assert re.search(
        r"WRONG \(training\): planted: the losses differ by \S+ from float32 on the CPU, and only 0\.001", report
    )


def test_attention_that_is_wrong_ends_the_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hour.attention_and_gradients

    def wrong(tensors: list[Tensor]) -> list[Tensor]:
        """Only the gradient of one backend and one length is wrong, as faults of real kernels were."""
        output, *gradients = right(tensors)
        if tensors[0].dtype == torch.bfloat16 and tensors[0].shape[2] == 16:
            gradients[1][..., -1, :] = 0
        return [output, *gradients]

    monkeypatch.setattr(hour, "attention_and_gradients", wrong)
    status, report = run(tmp_path / "hour", "attention")
    assert status == 1 and "| 33 x 33 | FLASH_ATTENTION |" in report
    assert "WRONG (attention): attention by FLASH_ATTENTION of 16 queries and 33 keys is off by" in report


def test_a_command_that_fails_ends_the_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hour, "EXACT", ("--banana", "1"))
    status, report = run(tmp_path / "hour", "training")
    assert status == 1 and "WRONG (training): uvit train: error: there is no flag --banana" in report


def test_without_a_gpu_it_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert hour.main(["--tiny", "--output_dir", str(tmp_path / "hour"), "--only", "card"]) == 1
    assert "sees no GPU: install the build for your CUDA version" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        hour.main(["--tiny", "--output_dir", str(tmp_path / "hour")])
    assert "is not empty; every hour needs a folder of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_a_pretended_gpu_equals_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = hour.Hour.uvit

    def uvit(self: Any, *words: str) -> str:
        with pretend_gpus() if "cuda:1" in words else contextlib.nullcontext():
            return here(self, *words)

    monkeypatch.setattr(hour.Hour, "uvit", uvit)
    monkeypatch.setattr(hour, "PRECISIONS", {"float32": hour.PRECISIONS["float32"]})
    arguments = ["--device", "cuda:1", "--tiny", "--output_dir", str(tmp_path / "hour"), "--only", "training"]
    assert hour.main(arguments) == 0
    assert "| float32 | 0.0e+00 | 0.0e+00 | 0.0e+00 |" in (tmp_path / "hour" / "report.md").read_text()
    with pretend_gpus():
        assert (
            hour.main(["--device", "cuda:1", "--tiny", "--output_dir", str(tmp_path / "card"), "--only", "card"]) == 0
        )
    assert "| GPU | 2 x NVIDIA H100 80GB HBM3, 80.0 GiB |" in (tmp_path / "card" / "report.md").read_text()
