"""A run of another objective, from its flags to the pipeline that it writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from uvit import UViTPipeline
from uvit.errors import UserError
from uvit.train.setup import build_run
from uvit.train.trainer import train


def test_a_linear_run_writes_a_pipeline_of_its_path_and_shift(
    tiny_config: Any, encoders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "path": "linear", "prediction_type": "flow_prediction", "timestep_shift": 2.0, "max_steps": 3,
        "image_logging_steps": 2, "num_inference_steps": 3, "validation_split": "heldout", "eval_steps": 3,
    }  # fmt: skip
    assert train(tiny_config(**flags)) == 0
    run = tmp_path / "run"
    assert [path.name for path in (run / "previews").iterdir()] == ["step-00000002.png"]
    last = json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(last["val_losses"]) == 8 and all(map(math.isfinite, last["val_losses"]))

    pipeline = UViTPipeline.from_pretrained(run / "pipeline")
    assert (pipeline.conventions.path, pipeline.conventions.prediction_type) == ("linear", "flow_prediction")
    assert pipeline.scheduler.config.flow_shift == 2
    images = pipeline("a red circle", num_inference_steps=3, output_type="pt").images
    assert torch.isfinite(images).all()

    with pytest.raises(UserError, match=r"was trained with another model(.|\n)*path: was linear, now vp"):
        train(tiny_config(**flags | {"path": "vp", "prediction_type": "epsilon", "max_steps": 4}))

    capsys.readouterr()
    build_run(tiny_config(pretrained_model_name_or_path=str(run / "pipeline")), tmp_path / "other")
    assert "was trained with path linear, and this run trains it with vp" in capsys.readouterr().out
