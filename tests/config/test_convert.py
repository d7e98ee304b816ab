from typing import Any

import pytest

from uvit.config.convert import ConvertConfig
from uvit.errors import UserError


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"push_to_hub": "me/model"}, "--push_to_hub me/model: needs a --license"),
        ({"push_to_hub": "model", "license": "mit"}, "--push_to_hub model: is no repository"),
        (
            {"push_to_hub": "me/model", "license": "mit", "to": "port"},
            "needs --to pipeline, diffusers or space, not --to port",
        ),
        ({"private": True}, "--private: .*without --push_to_hub"),
        ({"weights": "pdparams"}, "--weights pdparams: .* not of --to pipeline"),
        ({"vae_name_or_path": "v", "to": "paddle"}, "--vae_name_or_path v: is not part of what --to paddle writes"),
        ({"tokenizer_name": "t", "to": "trainer"}, "--tokenizer_name t: is not part of what --to trainer writes"),
        ({"license": "mit", "to": "onnx"}, "--license mit: .*--to onnx writes none"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}|{said}"):
        ConvertConfig("source", "dest", **flags)


def test_flags_that_do() -> None:
    ConvertConfig("source", "dest", to="diffusers", push_to_hub="me/model", license="mit", private=True)
    ConvertConfig("source", "dest", to="port", weights="pdparams")
    ConvertConfig("source", "dest", to="official", vae_name_or_path="vae")
