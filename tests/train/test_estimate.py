"""The estimate says what people ask; its figures are tested in tests/test_cost.py."""

from pathlib import Path
from typing import Any

from uvit.train.estimate import count_text_flops, describe
from uvit.train.setup import set_up


def test_the_description_names_what_people_ask(tiny_config: Any, tmp_path: Path) -> None:
    text = describe(set_up(tiny_config(train_text_encoder=True, fp16=True, fp16_opt_level="O2"), tmp_path))
    for word in ("parameters", "text encoder", "GFLOP", "MiB", "low-precision copy", "162.0 steps an epoch"):
        assert word in text


def test_recompute_costs_a_third_more_work(tiny_config: Any, tmp_path: Path) -> None:
    plain, recomputed = (describe(set_up(tiny_config(recompute=flag), tmp_path)) for flag in (False, True))
    work = [float(text.split(" FLOP")[0].rsplit(maxsplit=1)[1]) for text in (plain, recomputed)]
    assert 1.3 < work[1] / work[0] < 1.36


def test_a_frozen_text_encoder_is_counted(tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    run = set_up(tiny_config(feature_path=token_store), tmp_path)
    assert "of the frozen text encoder" in describe(run) and "frozen text encoder 0" in describe(run)
    assert "frozen" not in describe(set_up(tiny_config(), tmp_path))
    layers, tokens, width, inner = 2, 16, 32, 64
    linear = tokens * (4 * width * width + 2 * width * inner)
    attention = 2 * tokens * tokens * width
    assert count_text_flops(run.frozen_text_encoder, tokens) == 2 * layers * (linear + attention)


def test_the_validation_is_described(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(validation_split="heldout", eval_steps=100, num_validation_samples=50)
    assert "validation   50 of 72 samples, every 100 steps" in describe(set_up(config, tmp_path))
    assert "validation" not in describe(set_up(tiny_config(), tmp_path))
