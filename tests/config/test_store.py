import pytest

from uvit.cli.parse import parse
from uvit.config.store import (
    FeaturesExportConfig,
    FeaturesImportConfig,
    FeaturesInfoConfig,
    FeaturesMergeConfig,
    FeaturesSampleConfig,
    FeaturesVerifyConfig,
)
from uvit.errors import UserError


@pytest.mark.parametrize("cls", [FeaturesInfoConfig, FeaturesVerifyConfig, FeaturesSampleConfig])
def test_splits_are_plain_names(cls: type) -> None:
    assert cls("features", split="val").split == "val"
    with pytest.raises(UserError, match=r"^--split \.\./else: "):
        cls("features", split="../else")


@pytest.mark.parametrize(
    ("cls", "flag"),
    [
        (FeaturesImportConfig, {"shard_size": 0}),
        (FeaturesImportConfig, {"latent_scale": 0.0}),
        (FeaturesImportConfig, {"latent_scale": float("nan")}),
        (FeaturesExportConfig, {"split": "a/b"}),
    ],
)
def test_values_out_of_range_are_named(cls: type, flag: dict) -> None:
    ((name, value),) = flag.items()
    with pytest.raises(UserError, match=f"^--{name} {value}: "):
        cls("features", "out", **flag)


@pytest.mark.parametrize(
    "flag",
    [{"num_images": 0}, {"num_images": 1001}, {"seed": -1}]
    + [{"rows": rows} for rows in ("", "a", "1,,2", "3-1", "1-2-3", "0-1000000000000")],
)
def test_pairs_to_show(flag: dict) -> None:
    ((name, value),) = flag.items()
    with pytest.raises(UserError, match=f"^--{name} {value}: "):
        FeaturesSampleConfig("features", **flag)


def test_rows_as_numbers() -> None:
    assert FeaturesSampleConfig("features", rows="5, 1,7-9").row_numbers() == [5, 1, 7, 8, 9]
    assert FeaturesSampleConfig("features").row_numbers() is None


def test_parts_to_merge_need_no_flag() -> None:
    words = ["a", "b", "c", "--output_dir", "d"]
    config, _ = parse(FeaturesMergeConfig, words, "uvit features merge", positional=("paths",))
    assert config == FeaturesMergeConfig(paths=("a", "b", "c"), output_dir="d")
    with pytest.raises(UserError, match=r"^--paths a: give two or more feature stores"):
        FeaturesMergeConfig(paths=("a",), output_dir="d")
