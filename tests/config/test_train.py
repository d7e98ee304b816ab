from dataclasses import fields
from typing import Any

import pytest

from uvit.cli.help import read_source
from uvit.config.recipe import RecipeConfig
from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.train.optimizer import num_warmup_steps


def config(**flags: object) -> TrainConfig:
    return TrainConfig("features", "out", **flags)  # type: ignore[arg-type]


def test_the_defaults_are_the_published_ones() -> None:
    found = config()
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (32, 1)
    assert (found.learning_rate, found.weight_decay, found.adam_epsilon) == (2e-4, 0.03, 1e-8)
    assert (found.adam_beta1, found.adam_beta2) == (0.9, 0.9)
    assert (found.max_steps, found.warmup_steps, found.lr_scheduler_type) == (
        1_000_000,
        5000,
        "constant_with_warmup",
    )
    assert (found.max_grad_norm, found.seed, found.dataloader_num_workers) == (-1, 1234, 8)
    assert (found.logging_steps, found.image_logging_steps, found.save_steps) == (50, 1000, 5000)
    assert (found.validation_split, found.eval_steps, found.num_validation_samples) == ("val", 5000, 256)
    assert (found.max_nonfinite_steps, found.spike_factor, found.hang_timeout) == (20, 20.0, 600.0)
    assert (found.prediction_type, found.num_inference_steps, found.use_ema) == ("epsilon", 50, True)
    assert (found.uvit_config_file, found.fp16_opt_level) == ("uvit_t2i_small", "O1")


def test_the_flags_of_the_recipe_come_first_and_share_no_group_with_the_others() -> None:
    groups = {name: group for name, (group, _) in read_source(TrainConfig).items()}
    assert list(groups) == [field.name for field in fields(TrainConfig)]
    recipe = [field.name for field in fields(RecipeConfig)]
    assert list(groups)[: len(recipe)] == recipe
    assert not {groups.pop(name) for name in recipe} & set(groups.values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"max_steps": 0}, "--max_steps 0: must be at least 1"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0: must not be negative"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: must be a finite number"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0: must be at least 0 and below 1"),
        ({"snr_gamma": 0.0}, "--snr_gamma 0.0: must be above 0"),
        ({"save_total_limit": 0}, "--save_total_limit 0: must be at least 1; leave it out to keep all"),
        ({"muon_learning_rate": 0.01}, "--muon_learning_rate 0.01: needs --optim muon"),
        (
            {"optim": "muon", "learning_rate": 0.0},
            "--learning_rate 0: must be above 0 with --optim muon, whose rate changes in proportion",
        ),
        ({"ema_lengths": (0.1, 0.1)}, "--ema_lengths 0.1 0.1: names a length twice"),
        ({"ema_lengths": (0.1,), "use_ema": False}, "--ema_lengths 0.1: needs EMA weights; leave --use_ema False out"),
        ({"ema_snapshot_steps": 5}, "--ema_snapshot_steps 5: needs --ema_lengths"),
        (
            {"ema_lengths": (0.1,), "ema_update_steps": 7},
            "--save_steps 5000: must be a multiple of --ema_update_steps 7 with --ema_lengths",
        ),
        ({"image_logging_steps": 75}, "--image_logging_steps 75: must be a multiple of --logging_steps 50"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16: choose one"),
        ({"do_train": False}, "--do_train False: there is nothing to do; use --dry_run to look without training"),
        ({"eval_steps": 0}, "--eval_steps 0: must be at least 1; -1 never validates"),
        ({"num_validation_samples": 0}, "--num_validation_samples 0: must be at least 1"),
        (
            {"eval_steps": -1, "validation_feature_path": "x"},
            "--validation_feature_path x: needs --eval_steps above 0",
        ),
        ({"spike_factor": 0.5}, "--spike_factor 0.5: must be above 1; 0 skips no spikes"),
        ({"hang_timeout": -1.0}, "--hang_timeout -1.0: must be in 0..1,000,000,000"),
        (
            {"profiler_options": "5,9", "max_steps": 9},
            "--profiler_options 5,9: must end before the last step, which is --max_steps 9",
        ),
        ({"min_lr": 0.1}, "--min_lr 0.1: must not be above --learning_rate 0.0002"),
        ({"lr_scheduler_type": "polynomial", "lr_end": 0.1}, "--lr_end 0.1: must not be above --learning_rate 0.0002"),
        ({"eval_metrics": ("kid",), "eval_steps": -1}, "--eval_metrics kid: needs --eval_steps above 0"),
        ({"eval_metrics": ("kid", "kid")}, "--eval_metrics kid kid: names a metric twice"),
        ({"eval_metrics": ("fd",)}, "--eval_metrics fd: needs a --feature_extractor"),
        ({"eval_prompts": 0}, "--eval_prompts 0: must be at least 1"),
        ({"keep_best": "kid"}, "--keep_best kid: needs --eval_metrics that measure it, or must be val_loss"),
        ({"keep_best": "val_loss", "eval_steps": -1}, "--keep_best val_loss: needs --eval_steps above 0"),
        ({"profiler_options": "5"}, "--profiler_options 5: must be two steps from 1 on, such as 10,15"),
        (
            {"profiler_options": "batch_range=[0,10];profile_path=a"},
            "--profiler_options batch_range=[0,10];profile_path=a: must be two steps from 1 on, such as 10,15",
        ),
        (
            {"profiler_options": "profile_path=a"},
            "--profiler_options profile_path=a: must be two steps from 1 on, such as 10,15",
        ),
        ({"profiler_options": "5,3"}, "--profiler_options 5,3: must be two steps from 1 on, such as 10,15"),
        ({"profiler_options": "0,1"}, "--profiler_options 0,1: must be two steps from 1 on, such as 10,15"),
    ],
)
def test_contradictions_are_named(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        config(**flags)
    assert str(error.value) == sentence


def test_what_looks_odd_and_is_right() -> None:
    assert config(image_logging_steps=-1, logging_steps=7).image_logging_steps == -1
    assert config(do_train=False, dry_run=True).dry_run
    assert config(profiler_options="10,15").profiled_steps() == (10, 15)
    assert config().profiled_steps() is None
    assert config().ignored_flags() == []
    assert config(eval_steps=-1).eval_steps == -1
    assert config(spike_factor=0.0, hang_timeout=0.0).spike_factor == 0
    [sentence] = config(do_eval=True).ignored_flags()
    assert "validation runs whenever there is a validation split" in sentence


@pytest.mark.parametrize(
    ("flag", "value", "uses"),
    [
        ("text_encoder_learning_rate", 1e-5, {"train_text_encoder": True}),
        ("text_encoder_layers", 5, {"train_text_encoder": True}),
        ("ema_decay", 0.5, {}),
        ("num_cycles", 3.0, {"lr_scheduler_type": "cosine"}),
        ("lr_end", 1e-5, {"lr_scheduler_type": "polynomial"}),
        ("power", 2.0, {"lr_scheduler_type": "polynomial"}),
        ("ema_update_steps", 3, {}),
        ("uvit_config_file", "uvit_shapes", {}),
        ("eval_prompts", 5, {"eval_metrics": ("attributes",)}),
        ("eval_reference", "x.npz", {"eval_metrics": ("fid",)}),
        ("num_inference_steps", 7, {"image_logging_steps": 50}),
    ],
)
def test_flags_that_other_flags_leave_without_effect_are_named(flag: str, value: float, uses: dict[str, Any]) -> None:
    assert config(**{flag: value}, **uses).ignored_flags() == []
    unused: dict[str, Any] = {
        "ema_decay": {"ema_lengths": (0.1,)},
        "ema_update_steps": {"use_ema": False},
        "uvit_config_file": {"pretrained_model_name_or_path": "x"},
        "num_inference_steps": {"image_logging_steps": -1},
    }.get(flag, {})
    [sentence] = config(**{flag: value}, **unused).ignored_flags()
    assert sentence.startswith(f"--{flag} is ignored: ")


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, 5000),
        ({"warmup_ratio": 0.1}, 0),  # 0: the ratio counts
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 0),
        ({"warmup_ratio": 0.1, "warmup_steps": 5000}, 5000),
        ({"warmup_steps": 7}, 7),
    ],
)
def test_a_warmup_ratio_counts_unless_steps_are_given(flags: dict[str, Any], steps: int) -> None:
    found = config(**flags)
    assert found.warmup_steps == steps
    assert num_warmup_steps(found, 1000) == (steps or 100)
    both = {"warmup_ratio", "warmup_steps"} == set(flags) and steps > 0
    assert [sentence.partition(" is ")[0] for sentence in found.ignored_flags()] == ["--warmup_ratio"] * both


def test_profiler_options_in_paddles_form() -> None:
    found = config(profiler_options="batch_range=[10, 20];profile_path=a")
    assert found.profiled_steps() == (10, 20)
    [sentence] = found.ignored_flags()
    assert (
        sentence == "--profiler_options profile_path is ignored: only batch_range counts; the trace goes into the logs"
    )
    assert config(profiler_options="batch_range=[10,20]").ignored_flags() == []


@pytest.mark.parametrize("flag", ["hang_timeout", "num_cycles"])
def test_numbers_that_no_clock_or_cosine_takes_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match=f"^--{flag} 10000000000.0: must be"):
        config(**{flag: 1e10})
