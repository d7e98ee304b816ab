"""What a run will do, said before its first step: what a resumed one has left, and what it cannot do."""

from collections.abc import Callable, Mapping

import numpy as np

from uvit.checkpoint.folder import Checkpoint
from uvit.config.train import TrainConfig
from uvit.device import slow_precision
from uvit.train.epochs import epochs_done
from uvit.train.optimizer import learning_rate_factor, num_warmup_steps
from uvit.train.setup import Run, samples_per_step

MAX_INITIAL_SHARE = 0.05  # of the initial weights in the final EMA weights
EMA_TIMES = 10  # a good EMA forgets this many times over
MIN_RATES, MAX_RATES = 10, 1000  # learning rates that the shape of a schedule is judged by
NEARLY_NONE, EARLY = 1e-3, 0.8  # learning rate as a fraction of its peak; part of the run

# A resumed run


def describe_samples_done(run: Run) -> str:
    """Such as `6,400 samples, 1.5 epochs`."""
    begun = [each for each in run.batches.epochs if each.first_sample < max(1, run.samples)]
    return f"{run.samples:,} samples, {epochs_done(begun, run.samples):.4g} epochs"


def describe_resume(run: Run, checkpoint: Checkpoint) -> list[str]:
    """What is left to do and why, and what another batch or other data change. One sentence each."""
    config, left = run.config, max(0, run.max_steps - run.step)
    batch, before = run.samples_per_step, samples_per_step(checkpoint.record["config"])
    if config.num_train_epochs:
        until = f"--num_train_epochs {config.num_train_epochs:g}"
    else:
        until = f"--max_steps {config.max_steps:,}"
    end = run.samples + left * batch
    num_epochs = epochs_done(run.batches.epochs, end) - epochs_done(run.batches.epochs, run.samples)
    sentences = [
        f"resumed {checkpoint.folder}: step {run.step} of {max(run.step, run.max_steps)} ({describe_samples_done(run)})"
        f"; left until {until}: {left:,} steps of {batch:,} samples, {num_epochs:.4g} epochs"
    ]
    if batch != before and not config.num_train_epochs:
        with_before = left * before
        sentences.append(
            f"a step had {before:,} samples and now has {batch:,}: --max_steps counts steps of both, so the run ends "
            f"after {end:,} samples; it would have ended after {run.samples + with_before:,}, which --max_steps "
            f"{run.step + -(-with_before // batch)} gives"
            if left
            else f"a step had {before:,} samples and now has {batch:,}: --max_steps counts steps of both"
        )
    ranges = run.batches.epochs
    if len(ranges) > 1 and ranges[-1].first_sample >= run.samples:
        sentences.append(
            f"the data had {ranges[-2].size:,} samples and now has {ranges[-1].size:,}: epochs of the new size begin "
            f"at sample {ranges[-1].first_sample:,}"
        )
    return sentences


# What a run cannot do. Each function returns sentences; there are none if all is well.


def run_warnings(run: Run) -> list[str]:
    """Of `uvit train`."""
    config, num_steps = run.config, run.max_steps
    num_warmup = num_warmup_steps(config, run.schedule_steps)
    consequences = {
        "save_steps": "no checkpoint before the end, to resume from or roll back to",
        "eval_steps": "validation only at the end" if run.validation else "",
        "logging_steps": "one line, at the end",
        "image_logging_steps": "no previews",
        "max_nonfinite_steps": "no rollback",
        "ema_update_steps": "the EMA weights, and so the pipeline, stay the initial weights" if run.ema else "",
    }
    sentences = too_late(
        num_steps, {flag: (getattr(config, flag), what) for flag, what in consequences.items() if what}
    )
    if config.num_train_epochs and config.max_steps != TrainConfig.max_steps:
        sentences.append(
            f"--max_steps {config.max_steps}: is not used, because --num_train_epochs {config.num_train_epochs:g} ends "
            f"the run after {num_steps:,} steps"
        )
    if config.lr_scheduler_type != "constant":
        sentences += rate_warnings(
            lambda step: learning_rate_factor(step, config, num_steps, run.schedule_steps),
            run.step,
            num_steps,
            num_warmup,
            config.learning_rate,
            lower="--warmup_steps" if config.warmup_steps else "--warmup_ratio",
        )
    sentences += small_data(run.features.num_samples, run.samples_per_step)
    if run.ema:
        sentences += [] if config.ema_lengths else slow_ema(run.ema.decay, num_steps)
    if run.validation is None and not config.eval_metrics:
        default = {"eval_steps": (TrainConfig.eval_steps, -1), "num_validation_samples": (256,)}
        sentences += [
            f"--{flag} {getattr(config, flag)}: there is nothing to validate on; name a split with --validation_split, "
            "or features with --validation_feature_path"
            for flag, values in default.items()
            if getattr(config, flag) not in values
        ]
    if config.fp16_opt_level == "O2" and not (config.bf16 or config.fp16):
        sentences.append("--fp16_opt_level O2: all is float32 without --bf16 or --fp16")
    sentences += slow_precision("--bf16" if config.bf16 else "--fp16", run.device, run.precision.dtype)
    profiled, left = config.profiled_steps(), num_steps - run.step
    if profiled and profiled[1] >= left:
        sentences.append(
            f"--profiler_options {config.profiler_options}: no trace is written, because only {left} steps are left; "
            "choose earlier steps"
        )
    return sentences


def too_late(num_steps: int, flags: Mapping[str, tuple[int, str]]) -> list[str]:
    """`flags`: {flag: (every how many steps something happens, what it means if it never does)}."""
    late = [f"--{flag} {steps} ({what})" for flag, (steps, what) in flags.items() if steps > num_steps]
    return [f"the run ends at step {num_steps:,}, too early for {', '.join(late)}; lower them"] if late else []


def rate_warnings(
    factor: Callable[[int], float], first_step: int, num_steps: int, num_warmup: int, peak: float, lower: str
) -> list[str]:
    """Of a learning rate that never reaches its peak, rises again at the end, or is gone long before.

    Args:
        factor: step, counted from 0 -> the learning rate as a fraction of its peak.
        first_step: of this start of the run.
        lower: the flag that shortens the warm-up.
    """
    steps = np.linspace(first_step, num_steps - 1, min(num_steps - first_step, MAX_RATES)).astype(int).tolist()
    steps = sorted({*steps, max(first_step, min(num_warmup, num_steps - 1))})
    factors = [factor(step) for step in steps]
    highest = max(factors)
    if num_warmup >= num_steps:
        return [
            f"{lower}: the warm-up takes {num_warmup:,} steps, and the run has {num_steps:,}; the learning rate "
            f"reaches at most {highest * peak:.3g} of --learning_rate {peak:g}"
        ]
    after = {step: value for step, value in zip(steps, factors, strict=True) if step >= num_warmup}
    lowest = min(after, key=lambda step: after[step])
    if len(after) < MIN_RATES:
        return []
    if after[steps[-1]] > after[lowest] + 0.05:
        return [
            f"--num_cycles: the learning rate is at its lowest, {after[lowest] * peak:.3g}, at step {lowest:,}, and "
            f"ends at {after[steps[-1]] * peak:.3g}; end at half a wave (cosine) or a whole one (cosine_with_restarts)"
        ]
    gone = max((step for step, value in after.items() if value >= NEARLY_NONE), default=num_steps)
    if gone < EARLY * num_steps:
        return [
            f"the learning rate is below {NEARLY_NONE:g} of its peak after step {gone:,} of {num_steps:,}; lower "
            "--power, or train for fewer steps"
        ]
    return []


def small_data(num_samples: int, batch: int) -> list[str]:
    if num_samples >= batch:
        return []
    return [
        f"a step takes {batch:,} samples, and the data has {num_samples:,}: each step has each sample "
        f"{batch / num_samples:.3g} times; a smaller batch gives more steps for the same work"
    ]


def slow_ema(decay: float, num_steps: int) -> list[str]:
    share = decay**num_steps
    if share <= MAX_INITIAL_SHARE:
        return []
    better = max(0.0, 1 - EMA_TIMES / num_steps)
    return [
        f"--ema_decay {decay:g}: the EMA weights average over {1 / (1 - decay):,.0f} steps, and the run has "
        f"{num_steps:,}; in the end they are still {share:.1%} initial weights; --ema_decay {better:.4g} would leave "
        "almost none"
    ]
