"""The estimate says what people ask; its figures are tested in tests/test_cost.py."""

from pathlib import Path
from typing import Any

from uvit.train.estimate import describe
from uvit.train.setup import set_up


def test_the_description_names_what_people_ask(tiny_config: Any, tmp_path: Path) -> None:
    text = describe(set_up(tiny_config(train_text_encoder=True, fp16=True, fp16_opt_level="O2"), tmp_path))
    for word in ("parameters", "text encoder", "GFLOP", "MiB", "low-precision copy", "18.0 steps an epoch"):
        assert word in text


def test_recompute_costs_a_third_more_work(tiny_config: Any, tmp_path: Path) -> None:
    plain, recomputed = (describe(set_up(tiny_config(recompute=flag), tmp_path)) for flag in (False, True))
    work = [float(text.split(" FLOP")[0].rsplit(maxsplit=1)[1]) for text in (plain, recomputed)]
    assert 1.3 < work[1] / work[0] < 1.36
