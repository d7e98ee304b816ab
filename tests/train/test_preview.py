"""Previews: three rows of pictures, the same for the same weights; none where no VAE can be had."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_vae_folder
from uvit.errors import UserError
from uvit.train.preview import load_preview_decoder, preview_sheet
from uvit.train.setup import build_run


@pytest.mark.parametrize("text", ["stored", "trained", "frozen"])
def test_a_preview(text: str, tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    flags = {"stored": {}, "trained": {"train_text_encoder": True}, "frozen": {"feature_path": token_store}}[text]
    run = build_run(tiny_config(image_logging_steps=2, num_inference_steps=2, **flags), tmp_path)
    decoder = load_preview_decoder(run)
    assert decoder is not None
    sheet = preview_sheet(run, decoder)
    assert sheet.width > 8 * 64 and sheet.height > 3 * 64
    assert preview_sheet(run, decoder).tobytes() == sheet.tobytes()
    assert (tmp_path / "previews" / "step-00000000.png").is_file()


def test_without_a_vae(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_run(tiny_config(image_logging_steps=2), tmp_path)
    run.features.vae_name = None
    assert load_preview_decoder(run) is None
    assert "--vae_name_or_path" in capsys.readouterr().out
    with pytest.raises(UserError, match="/nowhere"):
        build_run(tiny_config(image_logging_steps=2, vae_name_or_path="/nowhere"), tmp_path)
    assert load_preview_decoder(build_run(tiny_config(), tmp_path)) is None


def test_another_vae_than_the_features(
    tiny_config: Any, edited_store: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, it is a mistake; found in the store under a name that has since become another's, it is passed over."""
    other = tiny_vae_folder(tmp_path / "vae", scaling_factor=0.3, seed=1)
    with pytest.raises(UserError, match=rf"--vae_name_or_path {other}: .*its fingerprint is \w{{12}}, not \w{{12}}\)"):
        build_run(tiny_config(image_logging_steps=2, vae_name_or_path=str(other)), tmp_path)
    changed = edited_store(vae={"name": str(other), "sha256": "0123456789abcdef"})
    assert load_preview_decoder(build_run(tiny_config(image_logging_steps=2, feature_path=changed), tmp_path)) is None
    assert "no previews" in capsys.readouterr().out
