from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from tests.tiny import tiny_vit_folder
from uvit.errors import UserError
from uvit.weights.vision import load_vision_model


def test_a_model_is_read_whole_and_frozen(tmp_path: Path) -> None:
    folder = tiny_vit_folder(tmp_path / "vit")
    model, has_pooler, processor = load_vision_model(str(folder))
    expected = ViTModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert has_pooler and processor.size["height"] == 32
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_not_whole_or_not_finite_are_refused(tmp_path: Path) -> None:
    folder = tiny_vit_folder(tmp_path / "vit")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(("query.weight", "q_proj.weight")))
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match="its weights lack 1 parameters"):
        load_vision_model(str(folder))
    weights[name][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="holds NaN or infinity"):
        load_vision_model(str(folder))
