"""The story that people run first, told fast: from nothing to pictures through the public commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_runs_and_runs_again(tmp_path: Path) -> None:
    environment = os.environ | {
        "UVIT_DEMO_DIR": str(tmp_path / "demo"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "runs" / "demo.sh"), "--fast"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "prompt accuracy on 24 heldout prompts" in first.stdout and "chance" in first.stdout

    out = tmp_path / "demo-fast"
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert results["num_prompts"] == 24 and 0 <= results["prompts"] <= results["attributes"] <= 1
    with Image.open(out / "evaluation" / "contact_sheet.png") as sheet:
        assert sheet.width > 800
    pictures = sorted((out / "samples").glob("0*.png"))
    assert len(pictures) == 3
    with Image.open(pictures[0]) as picture:
        assert picture.size == (32, 32) and "orange circle" in picture.text["prompt"]  # type: ignore[attr-defined]
    assert (out / "run" / "previews" / "step-00000060.png").is_file()

    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "all 60 steps are done" in again.stdout
