import inspect
import json
import math
from pathlib import Path

import pytest

from uvit.config.model import (
    KEY_CHOICES,
    KINDS,
    MODERN,
    MODERN_KINDS,
    SAMPLING_KEYS,
    model_arguments,
    model_config_names,
    resolve_model_config,
)
from uvit.errors import UserError
from uvit.model import UViTT2IModel
from uvit.modern_model import SKIPS, ModernUViTT2IModel


def write(folder: Path, content: object) -> str:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_keys_are_the_arguments_of_the_model() -> None:
    assert [*KINDS, *SAMPLING_KEYS] == list(inspect.signature(UViTT2IModel).parameters)
    assert [*MODERN_KINDS, *SAMPLING_KEYS] == list(inspect.signature(ModernUViTT2IModel).parameters)
    assert KEY_CHOICES == {"skip": SKIPS}
    assert ModernUViTT2IModel.__name__ == MODERN


def test_a_config_says_which_model_it_is_of(tmp_path: Path) -> None:
    modern = {"_class_name": "ModernUViTT2IModel", "num_layers": 2, "skip": "add"}
    assert resolve_model_config(write(tmp_path, modern | {"_diffusers_version": "1"})) == modern
    with pytest.raises(UserError, match="no key 'mlp_ratio'"):
        resolve_model_config(write(tmp_path, modern | {"mlp_ratio": 4}))
    with pytest.raises(UserError, match=r'skip is "sum"; it must be "concat" or "add" or "none"$'):
        resolve_model_config(write(tmp_path, modern | {"skip": "sum"}))
    with pytest.raises(UserError, match="there is no key 'skip'"):
        resolve_model_config(write(tmp_path, {"num_layers": 2, "skip": "add"}))
    assert model_arguments(modern | {"prediction_type": "sample"}, tmp_path) == modern
    with pytest.raises(UserError, match=r"skip is 1, which must be concat or add or none$"):
        model_arguments(modern | {"skip": 1}, tmp_path)


def test_all_published_names_are_shipped() -> None:
    names = ["small", "small_deep", "large", "huge", "gaint", "gaint2", "850M"]
    assert {f"uvit_t2i_{name}" for name in names} <= set(model_config_names())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("uvit_t2i_small_deep", "uvit_t2i_small_deep"),
        ("config/uvit_t2i_small.json", "uvit_t2i_small"),
        ("emoji", "uvit_emoji"),
        ("shapes", "uvit_shapes"),
        ("small", "uvit_t2i_small"),
        ("uvit_t2i_giant", "uvit_t2i_gaint"),
        ("config/uvit_t2i_giant2.json", "uvit_t2i_gaint2"),
    ],
)
def test_names_in_their_spellings(given: str, name: str) -> None:
    assert resolve_model_config(given) == resolve_model_config(name)


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uvit_t2i_small.json").write_text('{"num_layers": 2, "sample_size": [16, 24], "_class_name": "X"}')
    monkeypatch.chdir(tmp_path)
    assert resolve_model_config("uvit_t2i_small.json") == {"num_layers": 2, "sample_size": [16, 24]}
    assert resolve_model_config("uvit_t2i_small")["num_layers"] == 12


def test_others_keys_at_values_that_change_nothing(tmp_path: Path) -> None:
    port = {"norm_type": "layer_norm", "qk_scale": None, "out_channels": 4, "drop_rate": 0.0, "pos_drop_rate": None}
    port |= {"mlp_time_embed": False}
    assert resolve_model_config(write(tmp_path, port | {"in_channels": 4})) == {"in_channels": 4}
    for wrong, said in (
        ({"mlp_time_embed": True}, "mlp_time_embed is True, which this U-ViT does not have"),
        ({"norm_type": "rms"}, "norm_type is 'rms', which this U-ViT does not have"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate is 0.1, and this U-ViT has no dropout"),
        ({"out_channels": 8}, "out_channels 8 differs from in_channels"),
    ):
        with pytest.raises(UserError, match=f"^--uvit_config_file .*: {said}"):
            resolve_model_config(write(tmp_path, port | {"in_channels": 4} | wrong))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"--uvit_config_file uvit_t2i_smal: .*did you mean uvit_t2i_small\?.*uvit_t2i_850M"
    ):
        resolve_model_config("uvit_t2i_smal")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_layer": 12}, "'num_layer'; did you mean num_layers?"),
        ({"banana": 12}, "'banana'; the keys are sample_size, "),
        ({"num_layers": "12"}, 'num_layers is "12"; it must be a positive whole number'),
        ({"num_layers": 0}, "num_layers is 0; it must be a positive whole number"),
        ({"num_layers": True}, "num_layers is true; it must be a positive whole number"),
        ({"mlp_ratio": None}, "mlp_ratio is null; it must be a positive number"),
        ({"mlp_ratio": math.inf}, "mlp_ratio is Infinity; it must be a positive number"),
        ({"sample_size": [8]}, "sample_size is [8]; it must be [height, width]"),
        ({"bottleneck_dim": 0}, "bottleneck_dim is 0; it must be a positive whole number"),
        ({"conv": 1}, "conv is 1; it must be true or false"),
        ([1], "must map names to values, and holds list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_file_gets_one_sentence(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        resolve_model_config(path)
    assert str(error.value).startswith(f"--uvit_config_file {path}: ")
    assert message in str(error.value)
