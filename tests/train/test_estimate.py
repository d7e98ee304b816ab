"""The estimate says what people ask; its figures are tested in tests/test_cost.py and tests/train/test_plan.py."""

from typing import Any

import pytest

from uvit.errors import UserError
from uvit.train.dry_run import count_text_flops, describe_plan, look, plan_of_run
from uvit.train.setup import build_run


def test_the_description_names_what_people_ask(tiny_config: Any) -> None:
    text = describe_plan(tiny_config(train_text_encoder=True, fp16=True, fp16_opt_level="O2"))
    for word in ("parameters", "text encoder", "GFLOP", "MiB", "low-precision copy", "162.0 steps an epoch"):
        assert word in text
    assert "processes" not in text and "traffic" not in text


def test_a_thousand_processes_are_described_by_one(tiny_config: Any) -> None:
    text = describe_plan(tiny_config(dp_degree=64, sharding_parallel_degree=8, tensor_parallel_degree=2))
    assert "--tensor_parallel_degree 2 = 1024" in text
    assert "4 x 1 x 512 data ranks = 2,048 samples" in text and "0.3 steps an epoch" in text
    for word in ("a process", "gradients between replicas", "weights between shards", "activations within blocks"):
        assert word in text


def test_a_mistake_is_told_as_a_run_would_tell_it(tiny_config: Any, model_file: Any) -> None:
    mistakes: list[dict[str, Any]] = [
        {"tensor_parallel_degree": 3},
        {"pretrained_model_name_or_path": str(model_file.parent)},
        {"latent_scale": None, "feature_path": "nowhere"},
    ]
    for flags in mistakes:
        with pytest.raises(UserError) as told:
            look(tiny_config(**flags))
        assert any(f"--{name} " in str(told.value) for name in flags)


def test_recompute_costs_a_third_more_work(tiny_config: Any) -> None:
    plain, recomputed = (describe_plan(tiny_config(recompute=flag)) for flag in (False, True))
    work = [float(text.split(" FLOP")[0].rsplit(maxsplit=1)[1]) for text in (plain, recomputed)]
    assert 1.3 < work[1] / work[0] < 1.36


def test_text_encoders_are_counted(tiny_config: Any, token_store: str, tmp_path: Any) -> None:
    config = tiny_config(feature_path=token_store)
    frozen = build_run(config, tmp_path).frozen_text_encoder
    assert "of the frozen text encoder" in describe_plan(config)
    assert "frozen" not in describe_plan(tiny_config())
    assert frozen is not None
    num_bytes = sum(parameter.nbytes for parameter in frozen.parameters())
    assert plan_of_run(look(config)).memory["frozen text encoder"] == num_bytes
    layers, tokens, width, inner = 2, 16, 32, 64
    linear = tokens * (4 * width * width + 2 * width * inner)
    attention = 2 * tokens * tokens * width
    assert count_text_flops(frozen.to("meta"), tokens) == 2 * layers * (linear + attention)

    trained = build_run(tiny_config(train_text_encoder=True), tmp_path)
    weights = sum(parameter.nbytes for parameter in trained.networks.parameters())
    assert plan_of_run(look(trained.config)).memory["weights"] == weights


def test_the_validation_is_described(tiny_config: Any) -> None:
    config = tiny_config(validation_split="heldout", eval_steps=100, num_validation_samples=50)
    assert "validation   50 of 72 samples, every 100 steps" in describe_plan(config)
    assert "validation" not in describe_plan(tiny_config())
