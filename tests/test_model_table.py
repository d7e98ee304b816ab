"""The figures in docs/models.md are what the commands beside them print."""

import re
from pathlib import Path

import pytest

from uvit.bench.random_store import write_random_store
from uvit.cli.main import main
from uvit.config.model import resolve_model_config
from uvit.config.presets import preset_files
from uvit.train.profiling import meta_unet

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def table() -> dict[str, list[str]]:
    """{preset: the other cells of its row}."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_every_preset_is_in_the_table() -> None:
    assert list(table()) == sorted(table(), key=lambda name: number(table()[name][1]))
    assert set(table()) == set(preset_files("model"))


@pytest.mark.parametrize("size", ["small", "small_deep", "large"])
def test_the_modern_presets_do_as_many_flops_as_the_published_ones(size: str) -> None:
    modern, published = (float(table()[f"uvit_{kind}_{size}"][2]) for kind in ("modern", "t2i"))
    assert modern == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("name", preset_files("model"))
def test_the_figures_of_a_preset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, parameters, gflop, float32, bfloat16, *_ = table()[name]
    features = write_random_store(tmp_path / "features", meta_unet(resolve_model_config(name)), 1, block=1)
    command = ["train", "--dry_run", "--uvit_config_file", name, "--feature_path", str(features), "--output_dir", "run"]
    for flags, memory in (([], float32), (["--bf16"], bfloat16)):
        if flags and number(parameters) > 100_000_000:
            continue  # seconds each, and the same code
        assert main([*command, *flags]) == 0
        plan = capsys.readouterr().out
        assert f"{parameters} parameters" in plan and f" {gflop} GFLOP " in plan
        assert re.search(rf"memory +{memory} MiB", plan), plan


def number(cell: str) -> int:
    return int(cell.replace(",", ""))
