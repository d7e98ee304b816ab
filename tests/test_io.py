"""A config goes through YAML and comes back the same."""

from pathlib import Path

from uvit.cli.parse import parse
from uvit.config.train import TrainConfig
from uvit.io import to_yaml


def test_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(feature_path="données/特征", output_dir="x", fp16=True, snr_gamma=5.0, adam_epsilon=1e-12)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again, _ = parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")], prog="uvit train")
    assert again == config
