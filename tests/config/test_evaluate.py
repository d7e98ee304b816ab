"""Flags of `uvit evaluate`: what cannot work is refused, and protocols set what was not given."""

import pytest

from uvit.config.evaluate import (
    DEFAULTS,
    PROTOCOL_PROMPTS,
    PROTOCOL_PROMPTS_SHA256,
    PROTOCOLS,
    EvaluateCompareConfig,
    EvaluateConfig,
    EvaluateStatisticsConfig,
)
from uvit.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_prompts": 0}, "--max_prompts 0: must be "),
        ({"num_inference_steps": (50, 0)}, "--num_inference_steps 0: must be "),
        ({"batch_size": 0}, "--batch_size 0: must be "),
        ({"guidance_scale": (2.0, float("nan"))}, "--guidance_scale nan: must be "),
        ({"guidance_scale": (2.0, 2.0)}, "--guidance_scale 2.0 2.0: names a value twice"),
        ({"guidance_interval": (1.0,)}, "--guidance_interval 1: must be pairs"),
        ({"guidance_interval": (1.0, 10.0, 20.0, 10.0)}, "--guidance_interval 1 10 20 10: must be pairs"),
        ({"guidance_interval": (1, 9, 5, 9, 1, 9)}, "--guidance_interval 1 9 5 9 1 9: names an interval twice"),
        ({"guidance_interval": (1, 9.0000001, 1, 9)}, "--guidance_interval 1 9 1 9: names an interval twice"),
        ({"ema_lengths": (0.05, 0.0500000001)}, "--ema_lengths 0.05 0.0500000001: names a value twice"),
        ({"metrics": ("fd",)}, "--metrics fd: needs a --feature_extractor"),
        ({"shard": "2/2"}, "--shard 2/2"),
    ],
)
def test_an_evaluation_that_cannot_work(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        EvaluateConfig("model", "out", **flags)  # type: ignore[arg-type]


def test_a_protocol_sets_what_was_not_given_and_reports_what_was() -> None:
    config = EvaluateConfig("model", "out", protocol="uvit-coco", guidance_scale=(3.0,))
    resolved = config.resolved()
    assert (resolved.scheduler, resolved.num_inference_steps, resolved.resolution) == (("official",), (50,), 256)
    assert resolved.guidance_scale == (3.0,)
    assert config.protocol_changes() == {"guidance_scale": (3.0,)}
    assert EvaluateConfig("model", "out", protocol="uvit-coco", guidance_scale=(2.0,)).protocol_changes() == {}


def test_without_a_protocol_the_defaults_hold() -> None:
    resolved = EvaluateConfig("model", "out").resolved()
    assert {name: getattr(resolved, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_is_valid(protocol: str) -> None:
    config = EvaluateConfig("model", "out", protocol=protocol)  # type: ignore[arg-type]
    assert EvaluateConfig(**vars(config.resolved())).protocol_changes() == {}


def test_protocols_name_their_prompts() -> None:
    assert set(PROTOCOL_PROMPTS) == {name for name, preset in PROTOCOLS.items() if "prompts" not in preset}
    assert set(PROTOCOL_PROMPTS_SHA256) < set(PROTOCOL_PROMPTS)


def test_statistics_and_comparisons() -> None:
    with pytest.raises(UserError, match=r"^--metric fd: needs a --feature_extractor"):
        EvaluateStatisticsConfig("images", "a.npz", metric="fd")
    with pytest.raises(UserError, match=r"^--reports a: must be two"):
        EvaluateCompareConfig(("a",))
