"""What is recorded of encoders is what extraction records of them."""

from pathlib import Path

import pytest

from uvit.config.store import FeaturesImportConfig
from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.store.npy_convert import Recorded, recorded_encoders
from uvit.weights.encoders import fingerprint, load_diffusers_vae

MOMENTS, CONTEXT = (8, 4, 4), (16, 32)


def test_those_that_are_named_are_recorded(
    vae_folder: Path, text_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = recorded_encoders(FeaturesImportConfig("old", "new"), MOMENTS, CONTEXT)
    assert nothing == Recorded(None, None, None, LatentSpace(), None)
    monkeypatch.chdir(vae_folder.parent)
    config = FeaturesImportConfig(
        "old", "new", vae_name_or_path=vae_folder.name, tokenizer_name=str(text_encoder_folder)
    )
    named = recorded_encoders(config, MOMENTS, CONTEXT)
    assert (named.latent_space, named.resolution) == (
        LatentSpace(0.5),
        16,
    )  # the VAE's own; 4 latents a side, each of 4 pixels
    assert named.vae == {"name": str(vae_folder), "sha256": fingerprint(load_diffusers_vae(str(vae_folder)))}
    assert named.text_encoder is None
    assert named.tokenizer is not None
    assert named.tokenizer["name"] == str(text_encoder_folder)


def test_those_that_cannot_have_made_the_features_are_refused(vae_folder: Path, text_encoder_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^--vae_name_or_path .* has 4 latent channels"):
        config = FeaturesImportConfig("old", "new", vae_name_or_path=str(vae_folder))
        recorded_encoders(config, (32, 4, 4), CONTEXT)
    with pytest.raises(UserError, match=r"^--text_encoder_name_or_path .* has width 32"):
        config = FeaturesImportConfig("old", "new", text_encoder_name_or_path=str(text_encoder_folder))
        recorded_encoders(config, MOMENTS, (77, 768))
