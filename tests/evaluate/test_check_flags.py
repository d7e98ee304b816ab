"""A flag that has no effect is refused with a reason; a protocol's own settings, and defaults, are not."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.sample.parts import tiny_pipeline_folder
from uvit.config.evaluate import EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.check_flags import check_flags
from uvit.evaluate.reference import store_statistics


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline")))


def check(model: str, **flags: Any) -> None:
    config = EvaluateConfig(model, "out", **flags)
    check_flags(config, config.resolved())


KID: dict[str, Any] = {"metrics": ("kid",), "reference": "real", "feature_extractor": "vit"}


@pytest.mark.parametrize(
    "flags",
    [
        {"guidance_scale": (3.0,)}, {"num_inference_steps": (9,)}, {"scheduler": ("ddim",)}, {"repeats": 3},
        {"guidance_interval": (1.0, 500.0)}, {"ema": ("raw",)}, {"ema_lengths": (0.05,)}, {"seed": 1},
        {"batch_size": 4}, {"dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_flags_of_sampling_need_a_model(flags: dict[str, Any], pipeline: str) -> None:
    [(name, value)] = flags.items()
    value = " ".join(map(str, value)) if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=f"^--{name} {value}: has no effect, because images is no pipeline"):
        check("images", **KID, **flags)
    check(pipeline, **KID, prompts="shapes", **flags)


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ({"max_prompts": 5}, {"prompts": "shapes"}),
        ({"prompt_order": "hashed"}, {"prompts": "shapes"}),
        ({"nearest_k": 3}, {"metrics": ("prdc",)}),
        ({"kid_subsets": 3}, {"metrics": ("kid",)}),
        ({"kid_subset_size": 3}, {"metrics": ("kid",)}),
        ({"inception_input": "clean-fid"}, {"metrics": ("fid",)}),
        ({"inception_weights": "file"}, {"metrics": ("prdc",)}),
        ({"clip_name_or_path": "clip"}, {"metrics": ("clip_score",)}),
        ({"cmmd_name_or_path": "clip"}, {"metrics": ("cmmd",)}),
        ({"dinov2_name_or_path": "dino"}, {"metrics": ("retrieval",)}),
        ({"feature_extractor": "vit"}, {"metrics": ("kid",)}),
        ({"retrieval_cosine": "centered"}, {"reference": "real"}),
        ({"crop": "random"}, {"resolution": 8}),
        ({"resize": "box"}, {"resolution": 8}),
    ],
)
def test_flags_need_what_uses_them(flags: dict[str, Any], used: dict[str, Any]) -> None:
    [name] = flags
    with pytest.raises(UserError, match=f"^--{name} .*: has no effect, because .*; leave it out$"):
        check("images", **{"metrics": ("attributes",), **flags})
    check("images", **{"metrics": ("attributes",), **used, **flags})


def test_flags_of_real_images_need_some(pipeline: str) -> None:
    for flags in ({"resolution": 8}, {"crop": "random"}, {"icc": "ignore"}, {"image_folder": ("x",)}):
        for reference in (None, "real.NPZ"):
            with pytest.raises(UserError, match=f"^--{next(iter(flags))} .*: .* no real images are read"):
                check(pipeline, metrics=("attributes",), prompts="shapes", reference=reference, **flags)
        check(pipeline, metrics=("attributes",), prompts="shapes", reference="real", **flags)


def test_two_files_of_statistics_take_few_flags() -> None:
    check("a.NPZ", reference="b.npz", metrics=("fd",), feature_extractor="vit", device="cpu", disable_tqdm=True)
    for flags in ({"seed": 1}, {"prompts": "shapes"}, {"inception_input": "clean-fid"}, {"split": "val"}):
        with pytest.raises(UserError, match=f"^--{next(iter(flags))} .*: .* because a.NPZ holds statistics"):
            check("a.NPZ", reference="b.npz", metrics=("fid",), **flags)


def test_settings_of_a_protocol_are_not_given() -> None:
    check("images", protocol="uvit-coco", prompts="captions.json", reference="real")
    check("images", protocol="shapes", seed=0, repeats=1)


def test_statistics_refuse_them_too(tmp_path: Path) -> None:
    output = str(tmp_path / "a.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for metric, flags in (
        ("fid", {"dinov2_name_or_path": "x"}),
        ("fd_dinov2", {"inception_input": "clean-fid"}),
        ("fid", {"feature_extractor": "vit"}),
        ("fid", {"crop": "random"}),
    ):
        [(name, value)] = flags.items()
        with pytest.raises(UserError, match=rf"^--{name} {re.escape(value)}: has no effect"):
            store_statistics(EvaluateStatisticsConfig(str(tmp_path), output, metric, **flags))  # type: ignore[arg-type]
