"""A run, whole: what it writes, and that stopping and going on makes no difference."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.soak import TIMING_FIELDS
from uvit import UViTPipeline
from uvit.checkpoint.folder import checkpoint_folders, read_checkpoint, read_verified
from uvit.errors import UserError
from uvit.io import write_yaml
from uvit.train.trainer import train

FILES = ("weights", "ema", "optimizer")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as copies: load_file maps the file, which some tests change."""
    files = {name: load_file(folder / f"{name}.safetensors") for name in FILES}
    return {f"{name}/{key}": value.clone() for name, tensors in files.items() for key, value in tensors.items()}


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lines(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING_FIELDS} for record in records]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "noise_offset": 0.1, "snr_gamma": 5.0},
    "text encoder": {"train_text_encoder": True, "prediction_type": "v_prediction"},
    "workers, bf16 and a linear path": {
        "bf16": True,
        "dataloader_num_workers": 2,
        "path": "linear",
        "prediction_type": "sample",
        "loss_type": "v",
        "timestep_sampling": "logit_normal",
        "uniform_share": 0.25,
    },
    "float16 with masters": {"fp16": True, "fp16_opt_level": "O2"},
    "validation": {"validation_split": "heldout", "eval_steps": 3, "train_text_encoder": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(variant: str, tiny_config: Any, tmp_path: Path) -> None:
    flags = VARIANTS[variant]
    assert train(tiny_config(output_dir=str(tmp_path / "whole"), **flags)) == 0
    assert train(tiny_config(output_dir=str(tmp_path / "parts"), max_steps=3, **flags)) == 0
    assert train(tiny_config(output_dir=str(tmp_path / "parts"), **flags)) == 0
    assert same(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert not same(tmp_path / "whole" / "checkpoint-3", tmp_path / "whole" / "checkpoint-6")


def test_token_ids_and_a_frozen_encoder_resume_as_well(tiny_config: Any, token_store: str, tmp_path: Path) -> None:
    for name, max_steps in {"whole": (6,), "parts": (3, 6)}.items():
        for steps in max_steps:
            config = tiny_config(output_dir=str(tmp_path / name), feature_path=token_store, max_steps=steps)
            assert train(config) == 0
    assert same(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")


def test_validation_every_so_often_and_at_the_end_makes_no_difference_to_training(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated = {"validation_split": "heldout", "eval_steps": 4, "num_validation_samples": 8}
    assert train(tiny_config(output_dir=str(tmp_path / "with"), **validated)) == 0
    assert [line["step"] for line in lines(tmp_path / "with") if "val_loss" in line] == [4, 6]
    said = capsys.readouterr().out
    assert f", val {lines(tmp_path / 'with')[5]['val_loss']:.4f} at step 6" in said
    assert train(tiny_config(output_dir=str(tmp_path / "without"), **(validated | {"eval_steps": -1}))) == 0
    assert not any("val_loss" in line for line in lines(tmp_path / "without"))
    assert same(tmp_path / "with" / "checkpoint-6", tmp_path / "without" / "checkpoint-6")


def test_the_time_of_a_step_is_that_of_its_parts(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config())
    records = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    parts = [f"{part}_seconds" for part in ("data", "forward", "backward", "optimizer")]
    for record in records:
        assert all(record[part] > 0 for part in parts)
        assert sum(record[part] for part in parts) < 1.001 * record["seconds"]
        assert 0 < record["mfu"] < 1 and record["peak_memory_bytes"] > 2**26
    assert [record["save_seconds"] > 0 for record in records] == [False, False, False, True, False, False]


def test_sigterm_saves_and_the_same_command_goes_on(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(max_steps=100_000, save_steps=100_000)
    path = tmp_path / "config.yaml"
    write_yaml(config, path)
    command = [sys.executable, "-m", "uvit", "train", "--config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while "step 4/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "run the same command again" in said
    assert re.search(r"saved .*checkpoint-\d+ \(\d+\.\d s\)", said)
    [stopped] = checkpoint_folders(tmp_path / "run")
    step = read_checkpoint(stopped).step
    assert train(tiny_config(max_steps=step + 1)) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, step + 2))


def test_a_run_folder_has_what_it_should(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(image_logging_steps=4, num_inference_steps=2, report_to="tensorboard", train_text_encoder=True)
    assert train(config) == 0
    run = tmp_path / "run"
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-3", "checkpoint-6"]
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 1e-3
    assert [path.name for path in (run / "previews").iterdir()] == ["step-00000004.png"]
    assert list((run / "logs").glob("events.out.tfevents.*"))
    record = read_checkpoint(run / "checkpoint-6").record
    assert record["samples"] == 24 and record["latent_scale"] == 0.5 and record["config"]["seed"] == 1234
    pipeline = UViTPipeline.from_pretrained(run / "pipeline")
    assert pipeline.config.latent_scale == 0.5
    ema = load_file(run / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(value, ema[f"unet.{key}"]) for key, value in pipeline.unet.state_dict().items())
    assert all(torch.equal(v, ema[f"text_encoder.{k}"]) for k, v in pipeline.text_encoder.state_dict().items())
    assert "uvit sample" in capsys.readouterr().out


def test_only_the_latest_checkpoints_stay(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(save_steps=1, save_total_limit=2))
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == ["checkpoint-5", "checkpoint-6"]
    assert not list((tmp_path / "run").glob(".*"))


def test_a_half_written_checkpoint_is_passed_over(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config())
    whole = weights(tmp_path / "run" / "checkpoint-6")
    with (tmp_path / "run" / "checkpoint-6" / "ema.safetensors").open("r+b") as file:
        file.truncate(1000)
    train(tiny_config())
    said = capsys.readouterr().out
    assert "skipped: " in said and "ema.safetensors has 1000 bytes" in said and "checkpoint-3: step 3" in said
    again = weights(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_overwrite_keeps_what_was_there_under_another_name(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config())
    train(tiny_config(overwrite_output_dir=True, seed=1))
    assert "run.old1" in capsys.readouterr().out
    assert not same(tmp_path / "run" / "checkpoint-6", tmp_path / "run.old1" / "checkpoint-6")


def raise_error(*_: Any) -> None:
    raise RuntimeError("gone")


def test_torchrun_restarts_do_not_overwrite_once_more(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr("uvit.train.trainer.build_run", raise_error)  # it fails before it has begun
        train(tiny_config(overwrite_output_dir=True))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(tiny_config(overwrite_output_dir=True))
    assert (tmp_path / "run.old1").exists()
    train(tiny_config(overwrite_output_dir=True))  # it had begun
    assert not (tmp_path / "run.old2").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    train(tiny_config(overwrite_output_dir=True))
    assert (tmp_path / "run.old2").exists() and not list(tmp_path.glob("run*/.*"))


def test_a_checkpoint_of_another_model_is_refused(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config())
    other = json.loads(Path(tiny_config().uvit_config_file).read_text()) | {"num_layers": 4}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"--overwrite_output_dir .*\n  unet_config\.num_layers: was 2, now 4"):
        train(tiny_config(uvit_config_file=str(tmp_path / "other.json")))


def test_the_latest_checkpoint_of_a_new_folder(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's script names `latest` from its first start on."""
    for _ in range(2):
        train(tiny_config(resume_from_checkpoint="latest"))
    out = capsys.readouterr().out
    assert out.count(f"latest: {tmp_path / 'run'} has no checkpoint yet; starts at step 0") == 1


@pytest.mark.parametrize("file", ["nnet_ema.pth", "model_state.pdparams"])
def test_a_checkpoint_of_other_code_says_how_to_train_on(file: str, tiny_config: Any, tmp_path: Path) -> None:
    theirs = tmp_path / "run" / "checkpoint-5"
    theirs.mkdir(parents=True)
    (theirs / file).touch()
    for flags in ({}, {"resume_from_checkpoint": str(theirs)}):
        with pytest.raises(UserError, match=rf"PaddleMIX \({file}\); .*--pretrained_model_name_or_path {theirs}"):
            train(tiny_config(**flags))


def test_slurm_requeues_do_not_overwrite_once_more(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    train(tiny_config(overwrite_output_dir=True))
    assert (tmp_path / "run.old1").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(tiny_config(overwrite_output_dir=True))
    assert not (tmp_path / "run.old2").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # it was requeued before it came to this command
    train(tiny_config(overwrite_output_dir=True))
    assert (tmp_path / "run.old2").exists()


@pytest.mark.parametrize(
    ("field", "what"), [("vae", "VAE"), ("text_encoder", "text encoder"), ("tokenizer", "tokenizer")]
)
def test_going_on_with_features_by_another_encoder_is_refused(
    field: str, what: str, tiny_config: Any, edited_store: Callable[..., str], tmp_path: Path
) -> None:
    train(tiny_config(max_steps=1))
    other = edited_store(**{field: {"name": "elsewhere", "sha256": "0123456789abcdef"}})
    message = (
        rf"checkpoint-1: .* by other encoders than .*{other}; .*\n  fingerprint of the {what}: .*, now 0123456789ab"
    )
    with pytest.raises(UserError, match=message):
        train(tiny_config(feature_path=other))
    with pytest.raises(UserError, match="checkpoint-1"):
        train(tiny_config(feature_path=other, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")))


def test_a_checkpoint_that_names_no_fingerprints_is_gone_on_with(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(max_steps=3))
    path = tmp_path / "run" / "checkpoint-3" / "uvit.json"
    record = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_sha256")}
    path.write_text(json.dumps(record))
    assert train(tiny_config()) == 0


def test_going_back_to_an_earlier_checkpoint(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config())
    run = tmp_path / "run"
    before = weights(run / "checkpoint-6")
    train(tiny_config(resume_from_checkpoint=str(run / "checkpoint-3")))
    after = weights(run / "checkpoint-6")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_not_finite_ends_with_a_sentence(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(learning_rate=1e30, warmup_steps=1, max_steps=50, max_nonfinite_steps=3)
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row.*checkpoint-3.*lower --learning_rate"):
        train(config)
    assert lines(tmp_path / "run")[-1]["loss"] is None


def test_recompute_gives_the_same_weights(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(output_dir=str(tmp_path / "kept")))
    train(tiny_config(output_dir=str(tmp_path / "recomputed"), recompute=True))
    assert same(tmp_path / "kept" / "checkpoint-6", tmp_path / "recomputed" / "checkpoint-6")


def test_start_from_a_pipeline(tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config())
    pipeline = str(tmp_path / "run" / "pipeline")
    train(tiny_config(output_dir=str(tmp_path / "next"), pretrained_model_name_or_path=pipeline, max_steps=1))
    start = load_file(tmp_path / "next" / "checkpoint-1" / "weights.safetensors")  # the first update has LR 0
    ema = load_file(tmp_path / "run" / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(start[key], ema[key]) for key in start)


def test_the_profiler_writes_a_trace_and_the_benchmark_a_line(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(profiler_options="1,2", benchmark=True))
    assert (tmp_path / "run" / "logs" / "trace-1-2.json").stat().st_size > 1000
    last = capsys.readouterr().out.split("steady state")[1]
    assert "samples/s" in last and "% MFU" in last and "% waiting for data" in last


def test_dry_run_trains_nothing(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_config(dry_run=True)) == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "GFLOP" in said and "steps per epoch" in said
    assert not (tmp_path / "run").exists()


def test_the_checkpoint_that_was_resumed_stays_while_a_later_one_is_damaged(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config())
    file = tmp_path / "run" / "checkpoint-6" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert train(tiny_config(max_steps=3, save_total_limit=1)) == 0  # nothing to do: nothing may be lost
    assert "weights.safetensors is damaged" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert train(tiny_config(save_total_limit=1)) == 0
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-6"]
    read_verified(tmp_path / "run" / "checkpoint-6")


def test_another_version_of_transformers_resumes(tiny_config: Any, tmp_path: Path) -> None:
    """It may record other keys of the text encoder's config; what they say of the network counts."""
    flags = {"train_text_encoder": True}
    train(tiny_config(max_steps=3, **flags))
    path = tmp_path / "run" / "checkpoint-3" / "uvit.json"
    record = json.loads(path.read_text())
    text_config = record["text_encoder_config"]
    text_config["transformers_version"] = "4.0.0"
    del record["record_sha256"], text_config["layer_norm_eps"]  # that is the default
    path.write_text(json.dumps(record))
    assert train(tiny_config(**flags)) == 0
    text_config["hidden_act"] = "gelu"
    path.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    with pytest.raises(UserError, match=r"text_encoder_config\.hidden_act: was gelu, now quick_gelu"):
        train(tiny_config(**flags))


def test_logs_of_another_run_in_a_folder_of_logs_stay(tiny_config: Any, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for name, steps in (("a", 3), ("b", 6), ("b", 6)):
        train(tiny_config(output_dir=str(tmp_path / name), logging_dir=str(logs), max_steps=steps))
    assert sorted(path.name for path in logs.iterdir()) == ["metrics.jsonl", "metrics.old1.jsonl"]
    assert len((logs / "metrics.jsonl").read_text().splitlines()) == 6
    assert len((logs / "metrics.old1.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("content", [b"[1]\n", b'{"step": 1}\n', b"\xff\n", b"7\n"])
def test_a_log_that_is_none_is_named(content: bytes, tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(max_steps=3))
    (tmp_path / "run" / "logs" / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: is no line of metrics; move the file away"):
        train(tiny_config())


def test_what_cannot_happen_is_said(tiny_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(eval_steps=2, num_validation_samples=4, fp16_opt_level="O2"))
    said = capsys.readouterr().out
    for flag in ("eval_steps 2", "num_validation_samples 4"):
        assert f"warning: --{flag}: there is nothing to validate on" in said
    assert "--fp16_opt_level O2: all is float32" in said
