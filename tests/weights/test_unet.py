"""A U-ViT of either layout is the same model; what is missing, mixed or not told is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.port import TINY, same, tiny_modern_unet, tiny_unet
from uvit.config.model import CLASS_KEY, model_arguments, model_config_names, resolve_model_config
from uvit.errors import UserError
from uvit.modern_model import SKIPS, ModernUViTT2IModel
from uvit.weights.report import Report
from uvit.weights.unet import (
    is_norm,
    is_paddle,
    model_config,
    new_unet,
    transpose_unet,
    unet_config,
    unet_from_tensors,
)

PATH = Path("nnet.pth")


@pytest.mark.parametrize("paddle", [False, True])
def test_both_layouts(paddle: bool) -> None:
    unet = tiny_unet()
    weights = transpose_unet(unet.state_dict(), paddle)
    assert is_paddle(weights, PATH) is paddle
    report = Report()
    again = unet_from_tensors(weights, PATH, TINY, report)
    assert same(again.state_dict(), unet.state_dict()) and again.grid == unet.grid
    assert bool(report.converted) is paddle
    assert same(transpose_unet(transpose_unet(unet.state_dict())), unet.state_dict())


@pytest.mark.parametrize("name", model_config_names())
def test_shapes_tell_every_shipped_config(name: str) -> None:
    config = resolve_model_config(name)
    with torch.device("meta"):
        weights = new_unet(config).state_dict()
    report = Report()
    assert unet_config(weights, PATH, {}, report) == config
    *heads, text = report.defaulted
    assert f"num_text_tokens {config['num_text_tokens']}" in text
    assert ["attention heads" in line for line in heads] == ([] if CLASS_KEY in config else [True])


def test_an_odd_number_of_blocks_is_that_of_the_next_even_one() -> None:
    unet = new_unet(TINY | {"num_layers": 5})
    again = unet_from_tensors(unet.state_dict(), PATH, TINY | {"num_layers": 5}, Report())
    assert same(again.state_dict(), unet.state_dict())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 1}, "num_layers 1 is too few"),
        ({"sample_size": 18, "patch_size": 4}, "sample_size 18x18 is not a multiple of patch_size 4"),
        ({"num_attention_heads": 1, "attention_head_dim": 1}, "the width must be at least 2"),
        ({CLASS_KEY: "ModernUViTT2IModel", "attention_head_dim": 6}, "attention_head_dim 6 is not a multiple of 4"),
        ({CLASS_KEY: "ModernUViTT2IModel", "num_layers": 1}, "num_layers 1 is too few"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^--uvit_config_file: .*{message}"):
        new_unet(sizes)


@pytest.mark.parametrize("skip", SKIPS)
def test_a_modern_u_vit(skip: str) -> None:
    sizes = {key: value for key, value in TINY.items() if key != "mlp_ratio"} | {"skip": skip, "bottleneck_dim": 6}
    unet = tiny_modern_unet(skip=skip, bottleneck_dim=6)
    weights, config = unet.state_dict(), {CLASS_KEY: "ModernUViTT2IModel", **sizes}
    assert not is_paddle(weights, PATH)
    for known in (config, {key: config[key] for key in (CLASS_KEY, "num_text_tokens", "skip")}):
        again = unet_from_tensors(weights, PATH, known, Report())
        assert type(again) is ModernUViTT2IModel and same(again.state_dict(), unet.state_dict())
        assert model_config(again) == model_config(unet) == config | {"in_channels": 4, "patch_size": 2, "conv": True}
    with pytest.raises(UserError, match="does not fit its config, which is of UViTT2IModel"):
        unet_from_tensors(weights, PATH, TINY, Report())
    with pytest.raises(UserError, match=r"\n  attention_head_dim: the config says 8, the file has 16"):
        unet_from_tensors(weights, PATH, config | {"attention_head_dim": 8}, Report())
    with pytest.raises(UserError, match="is of ModernUViTT2IModel, and the file has a UViTT2IModel"):
        unet_from_tensors(tiny_unet().state_dict(), PATH, config, Report())
    if skip != "concat":
        with pytest.raises(UserError, match="do not tell whether its skips are added or left out; pass its config"):
            unet_from_tensors(weights, PATH, {}, Report())


def test_an_unconditional_network_is_said_to_be_one() -> None:
    weights = {name: value for name, value in tiny_unet().state_dict().items() if "context_embed" not in name}
    with pytest.raises(UserError, match=r"reads no text .* only text-to-image U-ViTs can be converted"):
        unet_from_tensors(weights, PATH, {}, Report())


@pytest.mark.parametrize("paddle", [False, True])
def test_a_bottleneck_shows_in_the_shapes(paddle: bool) -> None:
    unet = tiny_unet(bottleneck_dim=6)
    weights = transpose_unet(unet.state_dict(), paddle)
    again = unet_from_tensors(weights, PATH, TINY, Report())
    assert again.config["bottleneck_dim"] == 6 and same(again.state_dict(), unet.state_dict())
    with pytest.raises(UserError, match="does not fit its config"):
        unet_from_tensors(weights, PATH, {**TINY, "bottleneck_dim": None}, Report())


def test_norms_that_the_file_has_not_are_1_and_0() -> None:
    unet, report = tiny_unet(), Report()
    weights = {name: value for name, value in unet.state_dict().items() if not is_norm(name)}
    again = unet_from_tensors(weights, PATH, TINY, report)
    for name, value in again.state_dict().items():
        assert (value == name.endswith("weight")).all() if is_norm(name) else torch.equal(value, weights[name])
    assert report.defaulted == [
        f"{sum(map(is_norm, again.state_dict()))} LayerNorm weights and biases are 1 and 0, as the file has none"
    ]


def test_half_precision_is_said() -> None:
    report = Report()
    unet = unet_from_tensors(
        {name: value.half() for name, value in tiny_unet().state_dict().items()}, PATH, TINY, report
    )
    assert report.converted == ["U-ViT: float16 to float32"] and unet.dtype == torch.float32


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in tiny_unet().state_dict().items() if key != name}


def with_one(name: str, value: Any) -> dict[str, Any]:
    return dict(tiny_unet().state_dict()) | {name: value}


@pytest.mark.parametrize(
    ("weights", "known", "said"),
    [
        (without("norm.bias"), TINY, r"is not complete, 1 arrays of the U-ViT are missing \(norm.bias\)"),
        (without("in_blocks.0.mlp.fc1.weight"), TINY, "in_blocks.0.mlp.fc1.weight"),
        (without("pos_embed"), TINY, "is not complete"),
        (without("context_embed.weight"), TINY, "context_embed.weight"),
        (with_one("extra", torch.zeros(1)), TINY, r"1 arrays that the U-ViT does not have \(extra\)"),
        (with_one("norm.bias", torch.full((32,), torch.nan)), TINY, "norm.bias holds NaN or infinity"),
        (with_one("norm.bias", torch.zeros(3)), TINY, r"norm.bias has shape \(3,\), and the U-ViT needs \(32,\)"),
        (with_one("mid_block.mlp.fc1.weight", torch.zeros(32, 128)), TINY, "mixes layouts: mid_block.mlp.fc1.weight"),
        (without(""), {}, "width 32, and the shapes do not tell its heads; pass its config as --uvit_config_file"),
        (
            without(""),
            TINY | {"clip_dim": 48},
            "does not fit its config; .*\n  clip_dim: the config says 48, the file has 32",
        ),
        (without(""), TINY | {"num_attention_heads": 3}, "the config says 3 attention heads of 16"),
        (without(""), TINY | {"num_text_tokens": 9}, "has 24 positions, and not 1 for time, 9 for text"),
        (without(""), TINY | {"sample_size": 4}, "has 24 positions"),
    ],
)
def test_what_does_not_fit(weights: dict[str, Any], known: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^nnet.pth: .*{said}"):
        unet_from_tensors(weights, PATH, known, Report())


def test_the_ports_configs() -> None:
    extra = {"norm_type": "layer_norm", "qk_scale": None, "out_channels": None, "drop_rate": 0.1, "_class_name": "x"}
    assert model_arguments(TINY | extra, PATH) == TINY
    for changed in ({"qk_scale": 2.0}, {"norm_type": "rms"}, {"out_channels": 8, "in_channels": 4}):
        with pytest.raises(UserError, match=next(iter(changed))):
            model_arguments(TINY | extra | changed, PATH)
