import json
import re
from pathlib import Path

import pytest
import torch

from uvit.bench.run import bench, build_bench_run, format_table, time_rounds, with_sizes
from uvit.config.bench import BenchConfig
from uvit.errors import UserError

TINY = {
    "sample_size": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "clip_dim": 8,
    "num_text_tokens": 3,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_row_for_each_measurement(model: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench(BenchConfig(model, batch_size=2, steps=1, precision=precision, matmul_size=32, device="cpu", recompute=True))  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert f"batch 2, {precision}, recompute; cpu (" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["matmul", "forward", "training step"]
    for line in lines[3:5]:
        assert re.search(r" \d[\d.]*%$", line), line
    assert re.match(r"training step: \d[\d.]*% MFU; utilisation \(MFU\) is relative to ", lines[5])


def test_the_loader_is_measured_where_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench(BenchConfig(model, batch_size=2, steps=1, matmul_size=32, device="cpu", loader=True))
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"loader: [\d,]+ samples/s in one process", last)


def test_the_step_is_trainings_own(model: str, tmp_path: Path) -> None:
    run = build_bench_run(
        BenchConfig(model, batch_size=3, precision="bf16", recompute=True, device="cpu"), tmp_path / "bench"
    )
    assert run.config.per_device_train_batch_size == 3
    assert run.precision.dtype == torch.bfloat16
    assert run.master_model["unet"].gradient_checkpointing
    assert run.ema is not None


def test_sizes_are_those_of_the_device_unless_they_are_given() -> None:
    cpu, gpu = (with_sizes(BenchConfig(), torch.device(name)) for name in ("cpu", "cuda:0"))
    assert (cpu.batch_size, cpu.matmul_size, gpu.batch_size, gpu.matmul_size) == (4, 2048, 256, 8192)
    assert with_sizes(BenchConfig(batch_size=32), torch.device("cuda:0")).batch_size == 32


def test_each_measurement_stands_beside_the_matmuls_around_it() -> None:
    calls: list[str] = []
    jobs = {name: lambda n=name: calls.append(n) for name in ("a", "b")}
    timings = time_rounds(jobs, lambda: calls.append("m"), 2, torch.device("cpu"))
    assert "".join(calls) == "mmmammmbmmm" * 4, "two rounds to warm up, two measured"
    assert [len(rows) for rows in timings.values()] == [2, 2]


def test_the_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down by half, work and yardstick alike, keeps its ratio."""
    text = format_table(
        {"step": [(1.0, 0.1), (2.0, 0.2)]}, {"step": 8_000_000_000}, matmul_flops=1_000_000_000, batch_size=4
    )
    assert text.splitlines()[-1].split() == ["step", "1500.0", "2.67", "8.0", "5.3", "80.0%"]


def test_pixels_need_a_model_on_pixels() -> None:
    with pytest.raises(UserError, match=r"^--latents none: .* that of --uvit_config_file uvit_shapes has 4$"):
        bench(BenchConfig(uvit_config_file="uvit_shapes", latents="none"))
