"""Previews: three rows of pictures, the same for the same weights; none where no VAE can be had."""

from pathlib import Path
from typing import Any

import pytest

from uvit.errors import UserError
from uvit.train.preview import load_preview_vae, preview
from uvit.train.setup import set_up


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_preview(train_text_encoder: bool, tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(image_logging_steps=2, num_inference_steps=2, train_text_encoder=train_text_encoder)
    run = set_up(config, tmp_path)
    vae = load_preview_vae(run)
    assert vae is not None
    sheet = preview(run, vae)
    assert sheet.width > 8 * 64 and sheet.height > 3 * 64
    assert preview(run, vae).tobytes() == sheet.tobytes()
    assert (tmp_path / "previews" / "step-00000000.png").is_file()


def test_without_a_vae(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = set_up(tiny_config(image_logging_steps=2), tmp_path)
    run.features.vae_name = None
    assert load_preview_vae(run) is None
    assert "--vae_name_or_path" in capsys.readouterr().out
    named = set_up(tiny_config(image_logging_steps=2, vae_name_or_path="/nowhere"), tmp_path)
    with pytest.raises(UserError, match="/nowhere"):
        load_preview_vae(named)
    assert load_preview_vae(set_up(tiny_config(), tmp_path)) is None
