"""A folder with its code draws the same pictures in diffusers alone; this package never runs that code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.port import PORT_FOLDER, tiny_modern_unet
from uvit import ModernUViTT2IModel, UViTPipeline
from uvit.cli.main import main
from uvit.export.convert import write_pipeline
from uvit.export.standalone import collect_modules, flat_name
from uvit.weights.components import read_components

OPTIONS = {"num_inference_steps": 5, "output_type": "np"}
ALONE = """
import sys
sys.modules["uvit"] = None  # not installed
import numpy, torch
from diffusers import DiffusionPipeline
options = {"num_inference_steps": 5, "output_type": "np"}
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline("the bus", generator=torch.Generator().manual_seed(0), **options).images
    numpy.save(folder + ".npy", images)
"""


def test_modules_import_only_one_another() -> None:
    found = collect_modules("sample.pipeline")
    assert {"pipeline", "uvit_model", "uvit_diffusion", "uvit_sample_denoise"} <= set(found)
    for name, text in found.items():
        assert "from uvit" not in text and "import uvit" not in text, name
        compile(text, name, "exec")
        assert name == "pipeline" or f"from .{name} import" in found["pipeline"]
    assert flat_name("weights.encoders") == "uvit_weights_encoders"


@pytest.mark.slow
def test_diffusers_alone_draws_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    components = read_components(PORT_FOLDER)
    components.scheduler_config = None  # instead of the port's, ours
    (tmp_path / "pipeline").mkdir()
    write_pipeline(components, tmp_path / "pipeline")
    assert main(["convert", str(tmp_path / "pipeline"), str(folder), "--to", "diffusers"]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["limited_dpm_solver", "LimitedDPMSolverScheduler"]
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('code of a folder was run')\n" + path.read_text())
    pipeline = UViTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    ours = pipeline("the bus", generator=torch.Generator().manual_seed(0), **OPTIONS).images
    assert pipeline.config.timestep_labels == "0..999"
    for path in folder.rglob("*.py"):
        path.write_text(path.read_text().split("\n", 1)[1])
    components.unet = tiny_modern_unet()
    (tmp_path / "modern_pipeline").mkdir()
    write_pipeline(components, tmp_path / "modern_pipeline")
    modern = tmp_path / "modern"
    assert main(["convert", str(tmp_path / "modern_pipeline"), str(modern), "--to", "diffusers"]) == 0
    pipeline = UViTPipeline.from_pretrained(modern)
    assert type(pipeline.unet) is ModernUViTT2IModel
    ours_modern = pipeline("the bus", generator=torch.Generator().manual_seed(0), **OPTIONS).images
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, str(folder), str(modern)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "model.npy"), ours)
    assert np.array_equal(np.load(tmp_path / "modern.npy"), ours_modern)
    assert not np.array_equal(ours, ours_modern)
