"""The ledger: every arm parses, and a tiny one is measured, trained, judged, listed and not done twice."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.ablations import (
    against,
    arms_of,
    draw_curves,
    judge_of,
    ledger_table,
    lend,
    main,
    read_table,
    settings_of,
)
from benchmarks.lite_teacher import LITE0, LITE2, lite_teacher
from uvit.cli.main import main as run_uvit
from uvit.cli.parse import parse
from uvit.config.evaluate import EvaluateConfig
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.evaluate.efficientnet_lite import EfficientNetLite0
from uvit.sources.shapes import ShapesSource
from uvit.weights.unet import new_unet

TABLE = read_table()
TINY = {
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "clip_dim": 16,
}


@pytest.mark.parametrize("data", TABLE["data"])
def test_every_arm_parses_builds_and_changes_something(data: str, tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    for arm in arms_of(TABLE, data):
        settings = settings_of(TABLE, data, arm, "features", tmp_path)
        config, _ = parse(TrainConfig, [*settings.pop("train"), "--output_dir", "out"], prog="uvit train")
        with torch.device("meta"):
            new_unet(settings["model"] or resolve_model_config(config.uvit_config_file))
        content = f"{config} {settings}"
        assert content not in seen.values(), f"{arm} is equal to another arm"
        seen[arm] = content
        judge = judge_of(TABLE, data, arm)
        parse(EvaluateConfig, ["run", *judge, "--output_dir", "out"], prog="uvit evaluate", positional=("model",))
    assert "base" in seen


def test_a_tiny_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.ablations.WINDOW", 1)
    features, source = tmp_path / "features", tmp_path / "source"
    source.mkdir()
    shapes = ShapesSource("train", 32)
    for i in range(8):
        shapes[i].image.save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(shapes.captions(i)[0])
    for split in ("train", "val"):
        command = f"extract --source {source} --split {split} --val_every 4 --resolution 32 --vae_name_or_path shapes "
        command += f"--text tokens --model_max_length 18 --output_dir {features} --num_workers 0"
        assert run_uvit(command.split()) == 0
    data = {
        "train": "--config shapes --per_device_train_batch_size 2 --num_validation_samples 2",
        "evaluate": "--protocol shapes --max_prompts 2 --num_inference_steps 1 --guidance_scale 1 2",
        "model": TINY,
    }
    arms = {"base": {}, "v": {"train": "--prediction_type flow_prediction"}}
    table = tmp_path / "table.yaml"
    table.write_text(yaml.safe_dump({"data": {"tiny": data}, "arms": arms}))
    common = ["--features", str(features), "--table", str(table), "--seconds", "0.1", "--output_dir", str(tmp_path)]
    main(["tiny", "base", *common, "--seeds", "1", "2"])
    main(["tiny", "--base", "base", "v", *common, "--seeds", "1"])
    out = tmp_path / "tiny-0.1s"
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    found = [(row["arm"], row["seed"], row["setting"]) for row in rows]
    assert found == [(*run, f"guidance_scale {g}.0") for run in (("base", 1), ("base", 2), ("v", 1)) for g in (1, 2)]
    for row in rows:
        assert row["steps"] == max(1, round(0.1 / row["seconds_per_step"])) and row["val_loss"][0][0] == row["steps"]
        assert set(row["scores"]) >= {"prompts", "attributes"}
    assert (out / "ledger.md").read_text().count("\n") == 2 + 4
    assert {path.name for path in out.glob("curves*")} == {
        "curves-linear-sample.png",
        "curves-linear-flow_prediction.png",
    }

    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    capsys.readouterr()
    main(["tiny", "base", *common, "--seeds", "1", "2"])
    assert "steps are done" in capsys.readouterr().out
    assert before and {path: path.stat().st_mtime_ns for path in before} == before

    record = json.loads((out / "base" / "step.json").read_text())
    changed_preset = record | {"config": record["config"] | {"ema_decay": 0.5}}
    (out / "base" / "step.json").write_text(json.dumps(changed_preset))
    with pytest.raises(SystemExit, match="was run with other settings"):
        main(["tiny", "base", *common])
    (out / "base" / "step.json").write_text(json.dumps(record))

    for changed in ({"train": "--learning_rate 1"}, {"model": {"num_layers": 4}}):
        table.write_text(yaml.safe_dump({"data": {"tiny": data}, "arms": {"base": changed}}))
        with pytest.raises(SystemExit, match="was run with other settings"):
            main(["tiny", "base", *common])


def test_features_of_real_images_are_lent_and_never_replaced(tmp_path: Path) -> None:
    first, shared, second = (tmp_path / name / "reference" for name in ("first", "shared", "second"))
    lend(first, shared)  # not there yet
    assert not shared.exists()
    (first / "vit").mkdir(parents=True)
    (first / "vit" / "00000.safetensors").write_text("features")
    lend(first, shared)
    lend(shared, second)
    assert (second / "vit" / "00000.safetensors").read_text() == "features"
    (second / "vit" / "00000.safetensors").unlink()
    lend(shared, second)
    assert not (second / "vit" / "00000.safetensors").exists()


def test_what_is_no_arm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["banana"], "banana: the data sets are"),
        (["shapes", "banana"], "banana: the arms of shapes"),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--features", str(tmp_path)])
        assert message in capsys.readouterr().err
    (tmp_path / "table.yaml").write_text("data: {}\narms: {a: {trian: --bf16}}")
    with pytest.raises(SystemExit, match="the arm a has trian"):
        read_table(tmp_path / "table.yaml")


def row(arm: str, seed: int, distance: float) -> dict[str, object]:
    return {
        "arm": arm, "seed": seed, "setting": "", "steps": 1000, "seconds_per_step": 0.02, "val_loss": [[1000, 0.5]],
        "scores": {"fd-x": distance, "top1": 0.1}, "better": "lower",
    }  # fmt: skip


def test_the_table_has_means_spreads_and_losers_and_the_best_first() -> None:
    values = {"base": (200.0, 202.0, 204.0), "good": (150.0, 151.0, 152.0), "same": (201.0, 203.0, 202.0)}
    table = ledger_table([row(arm, seed, value) for arm, each in values.items() for seed, value in enumerate(each)])
    lines = table.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| good", "| base", "| same"]
    assert "| 151 ± 1 |" in lines[0] and lines[0].endswith("| -25.2% |")
    assert lines[1].endswith("| 0 |") and lines[2].endswith("| 0 |")
    assert "| 3 | 1,000 | 20.0 |" in lines[0] and "0.5 ± 0" in lines[0]


def test_small_or_uncertain_differences_are_no_findings() -> None:
    assert against([100.0, 101.0], [103.0, 103.1]) == "-2.5%, within noise"  # below 4%
    assert against([80.0, 120.0], [110.0, 112.0]) == "-9.9%, within noise"
    assert against([80.0, 81.0], [110.0, 112.0]) == "-27.5%"
    assert against([80.0], [110.0, 112.0]) == "-27.9%, one seed"
    assert against([80.0], []) == "-"


def test_curves_have_a_line_for_each_arm() -> None:
    image = draw_curves({"a": [(0.0, 1.0), (10.0, 0.5)], "b": [(0.0, 0.9), (12.0, 0.4)]})
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours and (44, 160, 44) not in colours
    assert draw_curves({"one": [(5.0, 1.0)]}).size == image.size  # one point has no extent


def test_the_ledgers_teacher_is_the_lite_network() -> None:
    """The judge's EfficientNet-Lite0 with random weights, by its own code and in transformers: bit for bit."""
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    teacher = lite_teacher(network.state_dict(), LITE0)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = teacher(images).last_hidden_state
        assert features.shape == (2, 1280, 2, 2)
        assert torch.equal(features.mean((2, 3)), network(images))
        assert network(images).std() > 0


def test_a_teacher_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder\.blocks.* here, .* in the weights"):
        lite_teacher(EfficientNetLite0().state_dict(), LITE2)
