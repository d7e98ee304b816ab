from pathlib import Path

import pytest

from uvit.config.presets import find_config, preset_files
from uvit.errors import UserError


def test_presets_have_names() -> None:
    assert {"emoji", "emoji_latents", "shapes", "coco_s2", "coco_s2_modern"} < set(preset_files("train"))
    assert {"uvit_emoji", "uvit_emoji_latents", "uvit_shapes", "uvit_t2i_small"} < set(preset_files("model"))
    assert preset_files("bench") == {}


def test_a_config_is_a_file_or_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("train", "emoji") == preset_files("train")["emoji"]
    Path("emoji").mkdir()
    assert find_config("train", "emoji") == preset_files("train")["emoji"]
    Path("shapes").write_text("seed: 1")
    assert find_config("train", "shapes") == Path("shapes")
    assert find_config("bench", "emoji") == Path("emoji")


@pytest.mark.parametrize(
    ("given", "hint"), [("emojy", "did you mean emoji? "), ("old/shapes.yaml", "did you mean shapes? "), ("x", "")]
)
def test_a_wrong_name_lists_the_presets(given: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        find_config("train", given)
    names = ", ".join(sorted(preset_files("train")))
    assert str(error.value) == f"--config {given}: is neither a file nor a preset; {hint}the presets are {names}"
